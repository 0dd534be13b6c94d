"""What `mix` accepts, and the layouts in which its kernels read images."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Inputs", "check_values", "dense", "is_channels_last", "prepare"]

_INDICES = (torch.int64, torch.int32)


class Inputs(NamedTuple):
    """The arguments of the op `_mix`, in their order."""

    images: Tensor
    index: Tensor | None
    """[N]: partners as rows of `images`."""
    partners: Tensor | None
    """Partners as images, like `images`."""
    boxes: Tensor | None
    """[4] or [N, 4]: y0, y1, x0, x1."""
    lam: Tensor | None
    """No dimensions or [N]."""
    mean: list[float]
    """Per channel; empty: not normalised."""
    std: list[float]
    dtype: torch.dtype
    channels_last: bool
    """Layout of the result."""


def is_channels_last(images: Tensor) -> bool:
    """Whether channels are the fastest axis; images that are dense in both orders count as NCHW."""
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def dense(images: Tensor, partners: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
    """Images and partners without gaps in one layout, copied where they are not; channels-last?"""
    channels_last = is_channels_last(images)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if partners is not None:
        partners = partners.contiguous(memory_format=layout)
    return images.contiguous(memory_format=layout), partners, channels_last


def prepare(
    images: Tensor,
    partner: Tensor | None,
    *,
    boxes: Tensor | None,
    lam: Tensor | float | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
) -> Inputs:
    """Check the arguments of `mix` and fill in defaults; looks at no value, waits for no device."""
    by_index = partner is not None and partner.dim() == 1
    index, partners = (partner, None) if by_index else (None, partner)
    if dtype is None:
        dtype = images.dtype if images.is_floating_point() else torch.float32
    _check_images(images, partners)
    _check_choice(images, index, boxes, lam)
    _check_combination(partner, boxes, lam)
    _check_devices(images, partner, boxes, lam)
    _check_normalization(mean, std, images.shape[1])
    if not dtype.is_floating_point:
        raise ValueError(f"mix: got dtype={dtype}; expected a floating dtype for the result")
    if memory_format not in (None, torch.channels_last, torch.contiguous_format):
        raise ValueError(
            f"mix: got memory_format={memory_format}; expected torch.channels_last, "
            "torch.contiguous_format or None"
        )
    if lam is not None and not isinstance(lam, Tensor):
        # Filled on the device: torch.tensor would copy from the host and wait.
        lam = torch.full((), lam, dtype=torch.float64, device=images.device)
    if memory_format is None:
        channels_last = is_channels_last(images)
    else:
        channels_last = memory_format == torch.channels_last
    means, stds = ([float(value) for value in values or ()] for values in (mean, std))
    return Inputs(images, index, partners, boxes, lam, means, stds, dtype, channels_last)


def _check_images(images: Tensor, partners: Tensor | None) -> None:
    if images.dim() != 4 or not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ValueError(
            f"mix: images are {_kind(images)}; expected [N, C, H, W], uint8 or floating"
        )
    if partners is not None and (partners.shape, partners.dtype) != (images.shape, images.dtype):
        raise ValueError(
            f"mix: partners are {_kind(partners)} but images are {_kind(images)}; give images like "
            "them, or indices [N]"
        )


def _check_choice(
    images: Tensor, index: Tensor | None, boxes: Tensor | None, lam: Tensor | float | None
) -> None:
    num = images.shape[0]
    if index is not None and (index.shape[0] != num or index.dtype not in _INDICES):
        raise ValueError(
            f"mix: partner indices are {_kind(index)}; expected [{num}], int64 or int32"
        )
    if boxes is not None and not (_per_batch_or_image(boxes, num, 4) and boxes.dtype in _INDICES):
        raise ValueError(
            f"mix: boxes are {_kind(boxes)}; expected [4] or [{num}, 4] with rows of y0, y1, x0, "
            "x1, int64 or int32"
        )
    if isinstance(lam, Tensor) and not (_per_batch_or_image(lam, num) and lam.is_floating_point()):
        raise ValueError(
            f"mix: lam is {_kind(lam)}; expected a number, or a floating tensor [] or [{num}]"
        )


def _check_combination(
    partner: Tensor | None, boxes: Tensor | None, lam: Tensor | float | None
) -> None:
    if partner is None and lam is not None:
        raise ValueError("mix: got lam but no partner; expected the images to be mixed with")
    if partner is not None and lam is None and boxes is None:
        raise ValueError(
            "mix: got a partner but neither boxes nor lam; give boxes for CutMix, lam for mixup"
        )


def _check_devices(
    images: Tensor, partner: Tensor | None, boxes: Tensor | None, lam: Tensor | float | None
) -> None:
    for name, x in (("partner", partner), ("boxes", boxes), ("lam", lam)):
        if isinstance(x, Tensor) and x.device != images.device:
            raise ValueError(
                f"mix: {name} is on {x.device} but images are on {images.device}; move it there"
            )


def _check_normalization(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> None:
    if (mean is None) != (std is None):
        raise ValueError(f"mix: got mean={mean} and std={std}; give both or neither")
    if mean is None or std is None:
        return
    if not (len(mean) == len(std) == channels and all(value > 0 for value in std)):
        raise ValueError(
            f"mix: got mean={tuple(mean)} and std={tuple(std)} for images with {channels} "
            "channels; expected a number per channel each, and std above 0"
        )


def check_values(inputs: Inputs) -> None:
    """Raise ValueError for partners beyond the batch or lam outside 0..1; waits for the device."""
    index, lam, num = inputs.index, inputs.lam, len(inputs.images)
    if index is not None and bool(((index < 0) | (index >= num)).any().item()):
        raise ValueError(
            f"mix: partner indices go from {index.min().item()} to {index.max().item()}; expected "
            f"0 to {num - 1}, the images of the batch"
        )
    if lam is not None and not bool(((lam >= 0) & (lam <= 1)).all().item()):
        raise ValueError(
            f"mix: lam goes from {lam.min().item()} to {lam.max().item()}; expected 0 to 1"
        )


def _per_batch_or_image(x: Tensor, num: int, *rest: int) -> bool:
    return tuple(x.shape) == rest or tuple(x.shape) == (num, *rest)


def _kind(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype}"
