"""The slow honest version of `mix`: plain torch, any device, any dtype, differentiable.

    inside the box   lam * image + (1 - lam) * partner      outside   image

mixup: Zhang et al. 2018, arXiv:1710.09412. CutMix: Yun et al. 2019, arXiv:1905.04899. Cutout:
DeVries and Taylor 2017, arXiv:1708.04552.
It runs where no kernel does, and the kernels must give its bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["mix_reference"]


def mix_reference(
    images: Tensor,
    index: Tensor | None,
    partners: Tensor | None,
    boxes: Tensor | None,
    lam: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Mixed images; arguments as `fastkd.kernels.mix` hands them to its op."""
    wide = torch.float64 if torch.float64 in (images.dtype, dtype) else torch.float32
    mixed = images_NCHW = _normalized(images, mean, std, wide)
    if index is not None or partners is not None or boxes is not None:
        if index is not None:
            partners_NCHW = images_NCHW.index_select(0, index)
        elif partners is not None:
            partners_NCHW = _normalized(partners, mean, std, wide)
        else:
            partners_NCHW = torch.zeros_like(images_NCHW)
        mixed = partners_NCHW
        if lam is not None:
            # From the nearer end, so that lam = 0 and lam = 1 give an image itself.
            weight = lam.to(wide).reshape(-1, 1, 1, 1)
            near_partner = weight < 0.5
            base = torch.where(near_partner, partners_NCHW, images_NCHW)
            factor = torch.where(near_partner, weight, weight - 1)
            mixed = base + factor * (images_NCHW - partners_NCHW)
        if boxes is not None:
            mixed = torch.where(_inside(boxes, images), mixed, images_NCHW)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    result = mixed.to(dtype, memory_format=layout)
    return result.clone() if result is images else result


def _normalized(
    images: Tensor, mean: Sequence[float], std: Sequence[float], wide: torch.dtype
) -> Tensor:
    """(image - mean) / std, every operation rounded on its own, as torchvision does it."""
    wide_images = images.to(wide)
    if images.dtype == torch.uint8:
        wide_images = wide_images * (1.0 / 255)
    if mean:
        mean_C, std_C = (
            torch.tensor(values, dtype=wide, device=images.device).view(-1, 1, 1)
            for values in (mean, std)
        )
        wide_images = (wide_images - mean_C) / std_C
    return wide_images


def _inside(boxes: Tensor, images: Tensor) -> Tensor:
    """Bool [N or 1, 1, H, W]: the pixels of the half-open boxes."""
    height, width = images.shape[2:]
    top, bottom, left, right = boxes.reshape(-1, 4, 1, 1, 1).unbind(1)
    row_H1 = torch.arange(height, device=boxes.device).view(-1, 1)
    col_W = torch.arange(width, device=boxes.device)
    return (row_H1 >= top) & (row_H1 < bottom) & (col_W >= left) & (col_W < right)
