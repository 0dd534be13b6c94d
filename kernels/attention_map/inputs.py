"""How the kernels of `attention_map` address a feature map: three strides, NCHW or channels-last.

Used by cpu.py and gpu.py. Pixels are numbered row by row; both layouts give them one stride.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Strides", "gradient_like", "readable"]


class Strides(NamedTuple):
    """Elements from one sample, channel or pixel to the next. Channel or pixel is 1."""

    sample: int
    channel: int
    pixel: int


def _strides(features_NCHW: Tensor) -> Strides | None:
    """The strides, or None where the kernels cannot read the tensor as it is."""
    _, _, height, width = features_NCHW.shape
    sample, channel, row, column = features_NCHW.stride()
    # The stride of a dimension of size 1 means nothing.
    pixel = column if width > 1 else row if height > 1 else 1
    if height > 1 and width > 1 and row != width * column:
        return None
    return Strides(sample, channel, pixel) if pixel == 1 or channel == 1 else None


def readable(features_NCHW: Tensor) -> tuple[Tensor, Strides]:
    """The tensor with its strides; a contiguous copy where it lies otherwise."""
    strides = _strides(features_NCHW)
    if strides is None:
        features_NCHW = features_NCHW.contiguous()
        strides = _strides(features_NCHW)
        assert strides is not None
    return features_NCHW, strides


def gradient_like(features_NCHW: Tensor, strides: Strides) -> tuple[Tensor, Tensor, Strides]:
    """(gradient, where to write it, its strides): the same tensor twice for common layouts.

    The kernels write along the axis that they read along, given by `strides`.
    """
    out = torch.empty_like(features_NCHW)
    found = _strides(out)
    if found is not None and (found.pixel == 1) == (strides.pixel == 1):
        return out, out, found
    written, found = readable(torch.empty_like(out, memory_format=torch.contiguous_format))
    return out, written, found
