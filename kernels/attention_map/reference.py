"""The slow honest version of `attention_map` and its loss: plain torch, any device, any dtype.

    energy = mean over channels of |x|^p, one number per pixel
    map    = energy / max(||energy||_2, eps)                       per sample

Zagoruyko & Komodakis 2017, arXiv:1612.03928, section 3.1; mean and p = 2 as in Moonshine, Crowley
et al. 2018, arXiv:1711.02613. It runs where no kernel does, it gives second derivatives, and the
kernels are tested against it in float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention_map_reference", "energy_reference", "loss_of_maps"]


def energy_reference(features_NCHW: Tensor, p: float, size: tuple[int, int]) -> Tensor:
    """Mean over channels of |x|^p after adaptive average pooling to `size`: [N, H*W]."""
    wide_NCHW = features_NCHW.to(torch.promote_types(features_NCHW.dtype, torch.float32))
    if tuple(wide_NCHW.shape[2:]) != size:
        wide_NCHW = F.adaptive_avg_pool2d(wide_NCHW, size)
    # abs() has no second derivative at 0, and an even power does not need it.
    powers_NCHW = wide_NCHW.pow(p) if p % 2 == 0 else wide_NCHW.abs().pow(p)
    return powers_NCHW.mean(dim=1).flatten(1)


def attention_map_reference(
    features_NCHW: Tensor, p: float, size: tuple[int, int], eps: float
) -> Tensor:
    """The map, L2-normalised per sample: [N, H*W]."""
    return F.normalize(energy_reference(features_NCHW, p, size), dim=1, eps=eps)


def loss_of_maps(student_NP: Tensor, teacher_NP: Tensor, distance: bool) -> Tensor:
    """Mean square of the maps' difference, or with `distance` the mean of its L2 norms."""
    gap_NP = student_NP - teacher_NP
    values = torch.linalg.vector_norm(gap_NP, dim=1) if distance else gap_NP.square()
    # Not mean(): an empty batch has loss 0, not NaN.
    return values.sum() / max(1, values.numel())
