"""`mix` on CPU tensors through the C++ core: layouts, one packed argument, one call.

Serves the op of this folder under the dispatcher's CPU key. Packed argument: `MixArgs` in cpu.cpp.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.kernels._library import STORAGE, Arguments, entry_point
from fastkd.kernels.mix.inputs import dense

__all__ = ["mixed"]

_ARGUMENTS = Arguments(
    images="P",
    partners="P",
    index="P",
    boxes="P",
    lam="P",
    mean="Q",
    std="Q",
    out="P",
    num="q",
    channels="q",
    height="q",
    width="q",
    source="q",
    target="q",
    source_channels_last="q",
    target_channels_last="q",
    fill="q",
    box_step="q",
    lam_step="q",
    threads="q",
)
# `Fill` in cpu.cpp.
_NOTHING, _ZERO, _PARTNER, _BLEND = range(4)


def mixed(
    images: Tensor,
    index: Tensor | None,
    partners: Tensor | None,
    boxes: Tensor | None,
    lam: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
    isa: str | None = None,
) -> Tensor:
    """Mixed images, see `fastkd.kernels.mix`. `isa` picks a clone, for benchmarks and tests."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(images.shape, dtype=dtype, memory_format=layout)
    images, partners, source_last = dense(images, partners)
    if index is not None:
        index, partners = index.to(torch.int64).contiguous(), images
    if boxes is not None:
        boxes = boxes.to(torch.int64).contiguous()
    if lam is not None:
        lam = lam.to(torch.float32).contiguous()
    fill = _NOTHING if boxes is None and partners is None else _ZERO
    if partners is not None:
        fill = _PARTNER if lam is None else _BLEND
    means, stds = ((ctypes.c_float * len(values))(*values) for values in (mean, std))
    num, channels, height, width = images.shape
    packed = _ARGUMENTS.pack(
        images=images,
        partners=partners,
        index=index,
        boxes=boxes,
        lam=lam,
        mean=ctypes.addressof(means) if mean else 0,
        std=ctypes.addressof(stds) if std else 0,
        out=out,
        num=num,
        channels=channels,
        height=height,
        width=width,
        source=STORAGE[images.dtype],
        target=STORAGE[dtype],
        source_channels_last=source_last,
        target_channels_last=channels_last,
        fill=fill,
        box_step=4 if boxes is not None and boxes.dim() == 2 else 0,
        lam_step=1 if lam is not None and lam.dim() == 1 else 0,
        threads=torch.get_num_threads(),
    )
    code = entry_point("mix", _ARGUMENTS, isa)(packed)
    if code > 0:
        assert index is not None
        raise ValueError(
            f"mix: partner {index[code - 1].item()} of image {code - 1} is out of range: the batch "
            f"has {len(images)} images (0 to {len(images) - 1})"
        )
    if code < 0:
        raise MemoryError(f"mix: no memory for the scratch of {images.shape[1]} channels")
    return out
