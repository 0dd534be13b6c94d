"""What `attention_map` accepts, and how its kernels address a feature map.

The kernels read NCHW and channels-last in place by three strides: pixels are numbered row by row,
and both layouts give them one stride.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "AttentionForm",
    "Strides",
    "check_features",
    "check_pair",
    "gradient_like",
    "map_size",
    "readable",
    "windowed",
]

AttentionForm = Literal["mean_square", "distance"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_features(op: str, name: str, x: Tensor, p: float, eps: float) -> None:
    """Raise ValueError for features, an exponent or an eps that give no map."""
    if x.dim() != 4 or x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(
            f"{op}: {name} are {list(x.shape)}; expected [N, C, H, W], only N may be 0"
        )
    if x.dtype not in _DTYPES:
        raise ValueError(f"{op}: {name} are {x.dtype}; expected fp32, bf16, fp16 or fp64")
    if not p >= 1:
        raise ValueError(
            f"{op}: got p={p}; expected at least 1, below which the gradient at 0 is infinite"
        )
    if not eps > 0:
        raise ValueError(f"{op}: got eps={eps}; expected a number above 0")


def map_size(features_NCHW: Tensor, size: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of the map: `size`, or the features' own."""
    height, width = features_NCHW.shape[2:]
    if size is None:
        return height, width
    if not (1 <= size[0] <= height and 1 <= size[1] <= width):
        raise ValueError(
            f"attention_map: size={tuple(size)} for features {list(features_NCHW.shape)}; expected "
            f"(height, width) from (1, 1) to {(height, width)}: maps are only pooled, not enlarged"
        )
    return size[0], size[1]


def check_pair(student_NCHW: Tensor, teacher_NCHW: Tensor, form: AttentionForm) -> None:
    """Raise ValueError for features of a student and a teacher that cannot be compared."""
    if form not in get_args(AttentionForm):
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


def windowed(features_NCHW: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """(features, window that the kernels average over): size * window is the features' size."""
    height, width = features_NCHW.shape[2:]
    if height % size[0] == 0 and width % size[1] == 0:
        return features_NCHW, (height // size[0], width // size[1])
    wide = torch.promote_types(features_NCHW.dtype, torch.float32)
    return F.adaptive_avg_pool2d(features_NCHW.to(wide), size), (1, 1)


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
