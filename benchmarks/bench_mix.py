"""CutMix, mixup, Cutout and normalisation: fastkd against eager torch and torch.compile.

    pytest benchmarks/bench_mix.py [--pairs 20] [--save-results]

Runs on the GPU if there is one. The eager side is the usual idiom, a clone and a slice with the box
on the host. The compiled side is the reference with the box on the device, as a box on the host
would compile anew in every step. A case whose result is off fails before any clock starts.
"""

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from fastkd.kernels import mix
from fastkd.kernels._library import Impl
from fastkd.kernels.mix.reference import mix_reference
from fastkd.testing import assert_as_accurate, freshly_compiled, shape_id

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(128, 3, 32, 32), (64, 3, 224, 224)]
KINDS = ["normalise", "cutout", "cutmix", "mixup"]
DTYPES = [torch.float32, torch.bfloat16]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAM = 0.3


def eager_mix(
    images: Tensor, kind: str, partner: Tensor, box: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """As most training loops spell it."""
    x = images
    if images.dtype == torch.uint8:
        wide = torch.promote_types(torch.float32, dtype)
        mean, std = statistics_on(x.device, wide)
        x = x.to(wide).mul_(1.0 / 255).sub_(mean).div_(std).to(dtype)
    if kind == "normalise":
        return x
    if kind == "mixup":
        return torch.lerp(x, x[partner], 1 - LAM)
    y0, y1, x0, x1 = box
    mixed = x.clone()
    mixed[:, :, y0:y1, x0:x1] = 0 if kind == "cutout" else x[partner, :, y0:y1, x0:x1]
    return mixed


@cache
def statistics_on(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, moved to the device once."""
    mean, std = (torch.tensor(v, dtype=dtype, device=device).view(-1, 1, 1) for v in (MEAN, STD))
    return mean, std


def sides_of(
    shape: tuple[int, ...],
    source: str,
    kind: str,
    dtype: torch.dtype,
    device: str,
    impl: Impl | None = None,
) -> tuple[dict[str, Callable[[], Tensor]], int]:
    """The mixed batch of each side, checked, and the bytes that have to move."""
    torch.manual_seed(0)
    side, bytes_in = shape[-1], source == "uint8"
    images = torch.randint(0, 256, shape, dtype=torch.uint8) if bytes_in else torch.randn(shape)
    images = images.to(device, torch.uint8 if bytes_in else dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    partner = torch.randperm(shape[0], device=device)
    box = (side // 8, side * 5 // 8, side // 4, side * 3 // 4)
    boxes = torch.tensor(box, device=device) if kind in ("cutmix", "cutout") else None
    index = partner if kind in ("cutmix", "mixup") else None
    lam = torch.tensor(LAM, device=device) if kind == "mixup" else None
    mean, std = (MEAN, STD) if bytes_in else (None, None)

    def reference() -> Tensor:
        return mix_reference(
            images, index, None, boxes, lam, mean or (), std or (), dtype, channels_last=True
        )

    sides = {
        "eager": lambda: eager_mix(images, kind, partner, box, dtype),
        "compile": freshly_compiled(reference),
        "fastkd": lambda: mix(
            images, index, boxes=boxes, lam=lam, mean=mean, std=std, dtype=dtype, impl=impl
        ),
    }

    def eager_in(wide: torch.dtype) -> Tensor:
        return eager_mix(images if bytes_in else images.to(wide), kind, partner, box, wide)

    mixed = sides["fastkd"]()
    assert torch.equal(mixed, reference())
    eager, truth = eager_in(torch.float32).to(dtype), eager_in(torch.float64)
    for name in ("compile", "fastkd"):
        assert_as_accurate(f"{kind}, {name}", sides[name](), eager, truth)
    return sides, mixed.numel() * (mixed.element_size() + images.element_size())


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["uint8", "x"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def bench_mix(shape, source, kind, dtype, table, race) -> None:
    """Channels-last in and out; source "x": images that are normalised already, in `dtype`."""
    if (source, kind) == ("x", "normalise"):
        pytest.skip("nothing to do")
    sides, moved_bytes = sides_of(shape, source, kind, dtype, DEVICE)
    found = race(sides, repeat=10 if math.prod(shape) < 1 << 20 else 1)
    table.rows.append(
        {
            "case": f"{kind} {shape_id(shape)} from {source}",
            "dtype": str(dtype).removeprefix("torch."),
            **found.cells(),
            "fastkd GB/s": moved_bytes / found.ms("fastkd") / 1e6,
        }
    )
