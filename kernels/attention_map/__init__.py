"""Attention maps of feature maps, and the attention-transfer loss between student and teacher.

Formula, passes over memory and error budget: README.md of this folder. `reference.py` says the same
in plain torch, `cpu.cpp` (through cpu.py) and `gpu.py` (Triton) are what runs.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from fastkd.kernels._library import Impl, choose_for
from fastkd.kernels.attention_map.op import Energy, Loss
from fastkd.kernels.attention_map.reference import attention_map_reference, loss_of_maps
from torch import Tensor

__all__ = ["AttentionForm", "attention_loss", "attention_map"]

AttentionForm = Literal["mean_square", "distance"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The powers of the paper (its F_sum, F_sum^2, F_sum^4), which need multiplications only.
_KERNEL_POWERS = (1, 2, 4)


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
    _check("attention_map", "features", features_NCHW, p, eps)
    height, width = features_NCHW.shape[2:]
    size = (height, width) if size is None else size
    if not (1 <= size[0] <= height and 1 <= size[1] <= width):
        raise ValueError(
            f"attention_map: size={tuple(size)} for features {list(features_NCHW.shape)}; expected "
            f"(height, width) from (1, 1) to {(height, width)}: maps are only pooled, not enlarged"
        )
    size = (size[0], size[1])
    if _backend("attention_map", [features_NCHW], p, impl) == "reference":
        return attention_map_reference(features_NCHW, p, size, eps)
    features_NCHW, window = _window(features_NCHW, size)
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
            swapped arguments (a teacher that requires grad beside a student that does not).
    """
    for name, x in (("student", student_NCHW), ("teacher", teacher_NCHW)):
        _check("attention_loss", f"{name} features", x, p, eps)
    if form not in ("mean_square", "distance"):
        raise ValueError(f"attention_loss: form={form!r} is neither 'mean_square' nor 'distance'")
    if student_NCHW.shape[0] != teacher_NCHW.shape[0] or student_NCHW.device != teacher_NCHW.device:
        raise ValueError(
            f"attention_loss: student features are {list(student_NCHW.shape)} on "
            f"{student_NCHW.device} but teacher features {list(teacher_NCHW.shape)} on "
            f"{teacher_NCHW.device}; expected the same images on the same device"
        )
    if teacher_NCHW.requires_grad and not student_NCHW.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "attention_loss: the teacher's features require grad and the student's do not; the "
            "order is attention_loss(student, teacher). Swap them, or detach both"
        )
    teacher_NCHW = teacher_NCHW.detach()
    if torch.float64 in (student_NCHW.dtype, teacher_NCHW.dtype):
        student_NCHW, teacher_NCHW = student_NCHW.double(), teacher_NCHW.double()
    size = (
        min(student_NCHW.shape[2], teacher_NCHW.shape[2]),
        min(student_NCHW.shape[3], teacher_NCHW.shape[3]),
    )
    if _backend("attention_loss", [student_NCHW, teacher_NCHW], p, impl) == "reference":
        student_NP = attention_map_reference(student_NCHW, p, size, eps)
        teacher_NP = attention_map_reference(teacher_NCHW, p, size, eps)
        return loss_of_maps(student_NP, teacher_NP, form == "distance")
    student_NCHW, student_window = _window(student_NCHW, size)
    teacher_NCHW, teacher_window = _window(teacher_NCHW, size)
    return Loss.apply(
        student_NCHW, teacher_NCHW, int(p), student_window, teacher_window, float(eps),
        form == "distance", impl == "triton",
    )  # fmt: skip


def _check(op: str, name: str, x: Tensor, p: float, eps: float) -> None:
    if x.dim() != 4 or x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{op}: {name} are {list(x.shape)}; expected [N, C, H, W], none but N 0")
    if x.dtype not in _DTYPES:
        raise ValueError(f"{op}: {name} are {x.dtype}; expected fp32, bf16, fp16 or fp64")
    if not p >= 1:
        raise ValueError(
            f"{op}: got p={p}; expected at least 1, below which the gradient at 0 is infinite"
        )
    if not eps > 0:
        raise ValueError(f"{op}: got eps={eps}; expected a number above 0")


def _window(features_NCHW: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """(features, window that the kernels average over): size * window is the features' size."""
    height, width = features_NCHW.shape[2:]
    if height % size[0] == 0 and width % size[1] == 0:
        return features_NCHW, (height // size[0], width // size[1])
    wide = torch.promote_types(features_NCHW.dtype, torch.float32)
    return F.adaptive_avg_pool2d(features_NCHW.to(wide), size), (1, 1)


def _backend(op: str, features: Sequence[Tensor], p: float, impl: Impl | None) -> Impl:
    picked = choose_for("attention_map", features, impl)
    if picked == "reference" or p in _KERNEL_POWERS:
        return picked
    if impl is not None:
        raise ValueError(
            f"{op}: impl={impl!r} has p = {_KERNEL_POWERS}, not {p}; use impl=None or 'reference'"
        )
    return "reference"
