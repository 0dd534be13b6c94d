"""`mix` on CPU tensors through the C++ core: layouts, one packed argument, one call.

Serves the op of this folder under the dispatcher's CPU key. The argument layout is `MixArgs` in
cpu.cpp.
"""

import ctypes
import struct
from collections.abc import Sequence

import torch
from fastkd.kernels._library import STORAGE, entry_point
from fastkd.kernels.mix.inputs import dense
from torch import Tensor

__all__ = ["mixed"]

_ARGS = struct.Struct("8Q12q")
_STORAGE = {**STORAGE, torch.uint8: 4}
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
    constants = [(ctypes.c_float * len(values))(*values) for values in (mean, std)]
    packed = _ARGS.pack(
        *(0 if t is None else t.data_ptr() for t in (images, partners, index, boxes, lam)),
        *(ctypes.addressof(c) if len(c) else 0 for c in constants),
        out.data_ptr(),
        *images.shape,
        _STORAGE[images.dtype],
        _STORAGE[dtype],
        source_last,
        channels_last,
        fill,
        4 if boxes is not None and boxes.dim() == 2 else 0,
        1 if lam is not None and lam.dim() == 1 else 0,
        torch.get_num_threads(),
    )
    code = entry_point("mix", isa)(packed)
    if code > 0:
        assert index is not None
        raise ValueError(
            f"mix: partner {index[code - 1].item()} of image {code - 1} is no image: the batch has "
            f"{len(images)} images (0 to {len(images) - 1})"
        )
    if code < 0:
        raise MemoryError(f"mix: no memory for the scratch of {images.shape[1]} channels")
    return out
