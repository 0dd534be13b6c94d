"""Attention maps of feature maps, and the attention-transfer loss between student and teacher.

Formula, passes over memory and error budget: README.md of this folder. `reference.py` says the same
in plain torch; `cpu.cpp` (through cpu.py) and `gpu.py` (Triton) are what runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.kernels._library import Impl
from fastkd.kernels.attention_map.inputs import (
    AttentionForm,
    check_features,
    check_pair,
    map_size,
    windowed,
)
from fastkd.kernels.attention_map.op import Energy, Loss, backend
from fastkd.kernels.attention_map.reference import attention_map_reference, loss_of_maps

__all__ = ["AttentionForm", "attention_loss", "attention_map"]


def attention_map(
    features_NCHW: Tensor,
    *,
    p: float = 2,
    size: tuple[int, int] | None = None,
    eps: float = 1e-12,
    impl: Impl | None = None,
) -> Tensor:
    """Where a feature map is active: mean over channels of |x|^p, L2-normalised per sample.

    Zagoruyko & Komodakis 2017, arXiv:1612.03928, section 3.1. The features are read once forward
    and once backward, in place if NCHW or channels-last; |x|^p is never stored.

    Args:
        features_NCHW: [N, C, H, W], fp32, bf16, fp16 or fp64.
        p: exponent, at least 1. Kernels have 1, 2 and 4; others take the plain torch reference.
        size: (height, width) of the map, at most H and W: the features are average-pooled to it
            first (adaptively; where it does not divide H and W, by torch, in fp32).
        eps: a map whose norm is below it is divided by it instead, as `F.normalize` does.
        impl: None picks by device; "reference", "cpp", "triton" force one.

    Returns:
        [N, height * width], fp32 (fp64 for fp64), computed in that precision. Differentiable; twice
        too, through the reference.

    Raises:
        ValueError: not four dimensions or none of the dtypes, no channel or pixel, p < 1, eps <= 0,
            a size larger than the features, or an impl that cannot run this.
    """
    check_features("attention_map", "features", features_NCHW, p, eps)
    size = map_size(features_NCHW, size)
    if backend("attention_map", [features_NCHW], p, impl) == "reference":
        return attention_map_reference(features_NCHW, p, size, eps)
    features_NCHW, window = windowed(features_NCHW, size)
    energy_NP = Energy.apply(features_NCHW, int(p), window, impl == "triton")
    return F.normalize(energy_NP, dim=1, eps=eps)


def attention_loss(
    student_NCHW: Tensor,
    teacher_NCHW: Tensor,
    *,
    p: float = 2,
    form: AttentionForm = "mean_square",
    eps: float = 1e-12,
    impl: Impl | None = None,
) -> Tensor:
    """Distance between the attention maps of a student and a teacher, one pair of taps.

    form="mean_square": mean over samples and pixels of (map_s - map_t)^2, which is what the code of
    AT, RepDistiller and Moonshine computes. form="distance": mean over samples of
    ||map_s - map_t||_2, as equation 2 of the papers prints it: their term is beta/2 times the sum
    of this over the taps (arXiv:1612.03928; Moonshine, arXiv:1711.02613).

    Args:
        student_NCHW: features [N, C, H, W], fp32, bf16, fp16 or fp64.
        teacher_NCHW: features [N, C', H', W'], any of these dtypes; no gradient flows to it. Where
            the sizes differ, the larger height and width are average-pooled to the smaller.
        p, eps, impl: see `attention_map`.

    Returns:
        Scalar, fp32 (fp64 if an input is), 0 for an empty batch. Exactly 0, with gradient exactly
        0, for equal features of one layout. The gradient has the student's dtype and layout.

    Raises:
        ValueError: as `attention_map`; also different batch sizes or devices, an unknown form, and
            swapped arguments (a teacher that requires grad with a student that does not).
    """
    for name, x in (("student", student_NCHW), ("teacher", teacher_NCHW)):
        check_features("attention_loss", f"{name} features", x, p, eps)
    check_pair(student_NCHW, teacher_NCHW, form)
    teacher_NCHW = teacher_NCHW.detach()
    if torch.float64 in (student_NCHW.dtype, teacher_NCHW.dtype):
        student_NCHW, teacher_NCHW = student_NCHW.double(), teacher_NCHW.double()
    size = (
        min(student_NCHW.shape[2], teacher_NCHW.shape[2]),
        min(student_NCHW.shape[3], teacher_NCHW.shape[3]),
    )
    distance = form == "distance"
    if backend("attention_loss", [student_NCHW, teacher_NCHW], p, impl) == "reference":
        student_NP = attention_map_reference(student_NCHW, p, size, eps)
        teacher_NP = attention_map_reference(teacher_NCHW, p, size, eps)
        return loss_of_maps(student_NP, teacher_NP, distance)
    student_NCHW, student_window = windowed(student_NCHW, size)
    teacher_NCHW, teacher_window = windowed(teacher_NCHW, size)
    return Loss.apply(
        student_NCHW,
        teacher_NCHW,
        int(p),
        student_window,
        teacher_window,
        float(eps),
        distance,
        impl == "triton",
    )
