"""The launches of `mix` that triton_offline.py compiles."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from triton_offline import Launch, recorded

from fastkd.kernels.mix import gpu

NAMES = {torch.uint8: "u8", torch.bfloat16: "bf16", torch.float32: "fp32"}
U8, BF16, FP32 = NAMES
# (what, side, from, to, channels-last from, to)
CASES = [
    ("normalise", 224, U8, BF16, True, True),
    ("cutmix", 32, U8, BF16, True, True),
    ("cutmix", 224, U8, BF16, True, True),
    ("cutmix", 224, U8, FP32, True, True),
    ("cutmix", 224, U8, BF16, False, False),
    ("cutmix", 224, U8, BF16, False, True),
    ("mixup", 224, U8, BF16, True, True),
    ("cutmix", 224, BF16, BF16, True, True),
    ("mixup", 224, BF16, BF16, True, True),
    ("cutout", 224, BF16, BF16, True, True),
]
REPRESENTATIVE = (CASES[1], CASES[5], CASES[8])
BATCH = 64
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def empty(*shape: int, dtype: torch.dtype, last: bool = False) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def launches() -> Iterator[Launch]:
    """Three channels; one box or lam for the batch, partners by index, as the trainer does it."""
    for case in CASES:
        what, side, source, target, source_last, target_last = case
        images = empty(BATCH, 3, side, side, dtype=source, last=source_last)
        by_bytes = source == U8
        call = partial(
            gpu.mixed,
            images,
            index=empty(BATCH, dtype=torch.int64) if what in ("cutmix", "mixup") else None,
            partners=None,
            boxes=empty(4, dtype=torch.int64) if what in ("cutmix", "cutout") else None,
            lam=empty(dtype=torch.float64) if what == "mixup" else None,
            mean=MEAN if by_bytes else (),
            std=STD if by_bytes else (),
            dtype=target,
            channels_last=target_last,
        )
        ((kernel, arguments, options),) = recorded(gpu, call)
        layouts = " -> ".join("NHWC" if last else "NCHW" for last in (source_last, target_last))
        # Each element of a CutMix comes from one of its sources.
        sources = 2 if what == "mixup" else 1
        yield Launch(
            kernel,
            f"{what} {side}px {NAMES[source]} -> {NAMES[target]}, {layouts}",
            arguments,
            options,
            moved_bytes=images.numel() * (target.itemsize + source.itemsize * sources),
            operations=images.numel() * (3 * by_bytes * sources + 3 * (what == "mixup") + 1),
            # Where the layouts differ the bytes of a vector come from different planes.
            wide_loads=source_last == target_last,
            representative=case in REPRESENTATIVE,
        )
