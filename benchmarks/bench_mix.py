"""CutMix, mixup, Cutout and normalisation: fastkd against eager torch and torch.compile.

    pytest benchmarks/bench_mix.py [--pairs 20] [--save-results]

Runs on the GPU when there is one. The ratios are medians (and 10th percentiles) of interleaved
pairs. The eager side is the usual idiom, a clone and a slice with a box on the host; the compiled
side is the reference with the box on the device, as a box on the host would compile anew each step.
A case whose result is off fails before any clock starts.
"""

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from fastkd.kernels import mix
from fastkd.kernels._library import Impl
from fastkd.kernels.mix.reference import mix_reference
from torch import Tensor

from fastkd.testing import interleave, speedup

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
        mean, std = statistics_on(x.device)
        x = x.float().mul_(1.0 / 255).sub_(mean).div_(std).to(dtype)
    if kind == "normalise":
        return x
    if kind == "mixup":
        return torch.lerp(x, x[partner], 1 - LAM)
    y0, y1, x0, x1 = box
    mixed = x.clone()
    mixed[:, :, y0:y1, x0:x1] = 0 if kind == "cutout" else x[partner, :, y0:y1, x0:x1]
    return mixed


@cache
def statistics_on(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation, put there once."""
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (MEAN, STD))
    return mean, std


def sides_of(
    shape: tuple[int, ...],
    source: str,
    kind: str,
    dtype: torch.dtype,
    device: str,
    impl: Impl | None = None,
) -> tuple[dict[str, Callable[[], Tensor]], int]:
    """The mixed batch of each side, the gate passed, and the bytes that have to move."""
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

    # A fresh cache: past its recompile limit torch.compile would quietly run eager code.
    torch._dynamo.reset()
    sides = {
        "eager": lambda: eager_mix(images, kind, partner, box, dtype),
        "compile": torch.compile(reference, dynamic=False),
        "fastkd": lambda: mix(
            images, index, boxes=boxes, lam=lam, mean=mean, std=std, dtype=dtype, impl=impl
        ),
    }
    # The gate: the bits of the reference; the others round elsewhere.
    want = reference()
    assert torch.equal(sides["fastkd"](), want)
    for name in ("eager", "compile"):
        torch.testing.assert_close(sides[name]().float(), want.float(), rtol=0.02, atol=0.02)
    return sides, want.numel() * (want.element_size() + images.element_size())


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["uint8", "x"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def bench_mix(shape, source, kind, dtype, table, benchmark, request) -> None:
    """Channels-last in and out; source "x": images that are normalised already, in `dtype`."""
    if (source, kind) == ("x", "normalise"):
        pytest.skip("nothing to do")
    sides, moved_bytes = sides_of(shape, source, kind, dtype, DEVICE)
    pairs = max(20, request.config.getoption("--pairs"))
    seconds = interleave(sides, pairs * (10 if math.prod(shape) < 1 << 20 else 1))
    over_eager, eager_p10 = speedup(seconds, "eager", "fastkd")
    over_compile, compile_p10 = speedup(seconds, "compile", "fastkd")
    row = {
        "case": f"{kind} {'x'.join(map(str, shape))} from {source}",
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{k} ms": 1e3 * sorted(v)[len(v) // 2] for k, v in seconds.items()},
        "vs compile": over_compile,
        "p10": compile_p10,
        "vs eager": over_eager,
        "p10 ": eager_p10,
        "fastkd GB/s": moved_bytes / sorted(seconds["fastkd"])[len(seconds["fastkd"]) // 2] / 1e9,
    }
    table.rows.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(sides["fastkd"], rounds=3, warmup_rounds=1)
