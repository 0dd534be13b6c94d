"""Part 2: every op against eager torch, torch.compile and Liger-Kernel, in the cases of bench_*.

A ratio is time(other) / time(fastkd), median and 10th percentile over interleaved pairs, once `as
called` and once `captured` (clock.py). GB/s are the bytes that have to move divided by the captured
time, beside the bandwidth of a copy in the same process.
"""

import math
import statistics
from collections.abc import Iterator
from typing import Any

import bench_attention_map
import bench_hardness
import bench_kd_loss
import bench_mix
import torch
from gpu_parts import blocks
from gpu_parts.clock import Sides, copy_gbps, peak_bytes, times
from gpu_parts.record import Job

from fastkd.losses import KDLoss
from fastkd.testing import (
    assert_loss_as_accurate,
    eager_kd_loss,
    forward_backward,
    interpret_fma_as_fused,
    shape_id,
    speedup,
)

__all__ = ["run"]

# In addition to those of the bench files: sizes for the bandwidth bar of a GPU.
LARGE = [(4096, 1000), (8, 150, 512, 512)]
BANDWIDTH_FROM = 64 << 20
DIFFERENTIATED = ("kd_loss", "attention", "block")
# Geometric means; a block's is over the best other side of each case.
BARS = {"kd_loss": 1.2, "block": 1.3, "block inference": 1.5}


def run(job: Job) -> None:
    """All cases, until the time is up."""
    if job.rehearse:
        interpret_fma_as_fused()
    copied = copy_gbps(job.device, 1 << 20 if job.rehearse else 4 << 30)
    job.record.note(f"a copy moves {copied:.0f} GB/s, read plus written")
    ratios: dict[str, list[float]] = {}
    for op, name, sides, moved in cases(job):
        if not job.in_time(name, 5):
            continue
        with job.record.case(name), torch.set_grad_enabled(op in DIFFERENTIATED):
            row = measure(job, name, sides, moved, copied)
            job.record.row(op, row)
            judge(job, op, name, row, moved)
            others = ("compile", "eager") if op.startswith("block") else ("compile",)
            gain = min(row[f"vs {side}, captured"] for side in others)
            if not math.isnan(gain):
                ratios.setdefault(op, []).append(gain)
    for op, values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        other = "the best of eager and compile" if op.startswith("block") else "compile"
        job.record.note(f"{op}: geometric mean against {other}, captured: {mean:.2f}")
        if op in BARS and mean < BARS[op]:
            bar = f"{op} is {BARS[op]} times as fast as {other} on average"
            job.record.short(bar, f"{mean:.2f}")
    with job.record.case("Liger-Kernel"):
        liger(job)
    job.record.missing(
        "flash-linear-attention: its only divergence (FusedKLDivLoss, 0.6.0) takes hidden states "
        "and the weights of both heads, T = 1; none of our ops does that"
    )


def cases(job: Job) -> Iterator[tuple[str, str, Sides, int]]:
    """Op, name, checked sides, bytes that have to move."""
    small, where, impl = job.rehearse, str(job.device), job.impl
    fp32, bf16 = torch.float32, torch.bfloat16
    shapes: list[Any] = [(8, 100), (2, 5, 4, 6)] if small else [*bench_kd_loss.SHAPES, *LARGE]
    # The interpreter truncates to bf16 where a chip rounds: too inaccurate for the checks.
    dtypes = [fp32] if small else [bf16, fp32]
    maps = (bench_attention_map.STUDENT, bench_attention_map.TEACHER)
    pictures = [*bench_mix.SHAPES, (256, 3, 224, 224)]
    picks = bench_hardness.CASES
    if small:
        maps, pictures = ((4, 8, 8, 8), (4, 16, 8, 8)), [(4, 3, 8, 8)]
        picks = [((16, 20), "kl", fp32)]
    # One dtype after the other: a run that is cut short has every op in bf16.
    for dtype in dtypes:
        for shape in shapes:
            with job.record.case(f"kd_loss {shape}"):
                made = bench_kd_loss.sides_of(shape, dtype, where, impl)
                yield "kd_loss", name_of(shape_id(shape), dtype), *made
        for pool, criterion, of_dtype in picks:
            if of_dtype == dtype:
                with job.record.case(f"hardness {pool}"):
                    made = bench_hardness.sides_of(pool, criterion, dtype, where, impl)
                    yield "hardness", name_of(f"{shape_id(pool)} {criterion}", dtype), *made
        for layout in bench_attention_map.LAYOUTS:
            with job.record.case(f"attention {layout}"):
                sides, moved, _ = bench_attention_map.sides_of(dtype, layout, where, impl, maps)
                yield "attention", name_of(layout, dtype), sides, moved
        for shape in pictures:
            for source, kind in (("uint8", "normalise"), ("x", "cutmix"), ("x", "mixup")):
                with job.record.case(f"mix {kind}"):
                    name = name_of(f"{kind} {shape_id(shape)} from {source}", dtype)
                    yield "mix", name, *bench_mix.sides_of(shape, source, kind, dtype, where, impl)
        yield from blocks.cases(job, dtype)


def name_of(what: str, dtype: torch.dtype) -> str:
    """A case and its dtype."""
    return f"{what} {str(dtype).removeprefix('torch.')}"


def measure(job: Job, name: str, sides: Sides, moved: int, copied: float) -> dict[str, Any]:
    """One row."""
    pairs = 3 if job.rehearse else 60
    called = times(sides, job.device, pairs=pairs)
    # A side that picks its rows on the host cannot be captured: its cells stay empty.
    graphs = times(sides, job.device, pairs=pairs, capture=True)
    if "fastkd" not in graphs:
        raise AssertionError("fastkd makes the host wait")
    row: dict[str, Any] = {"case": name}
    for kind, seconds in (("as called", called), ("captured", graphs)):
        seconds = {side: seconds.get(side, [math.nan] * pairs) for side in sides}
        for side, values in seconds.items():
            row[f"{side} us, {kind}"] = 1e6 * statistics.median(values)
        for over in ("compile", "eager"):
            ratio = speedup(seconds, over, "fastkd")
            row[f"vs {over}, {kind}"] = ratio.median
            row[f"p10 vs {over}, {kind}"] = ratio.p10
    row["GB/s"] = moved / (row["fastkd us, captured"] * 1e3)
    row["share of copy"] = row["GB/s"] / copied
    for side in ("compile", "fastkd"):
        row[f"{side} peak MB"] = peak_bytes(sides[side], job.device) / 1e6
    return row


def judge(job: Job, op: str, name: str, row: dict[str, Any], moved: int) -> None:
    """Hold a row against the bars of the fused loss, and `never slower`, the bar of all ops."""
    for kind in ("as called", "captured"):
        ratio, p10 = row[f"vs compile, {kind}"], row[f"p10 vs compile, {kind}"]
        if ratio < 0.99 or p10 < 0.95:
            bar = f"{op} {name} {kind}: never slower than compile (0.99, 10th percentile 0.95)"
            job.record.short(bar, f"{ratio:.2f}, {p10:.2f}")
    if op != "kd_loss":
        return
    if moved < BANDWIDTH_FROM and row["vs eager, captured"] < 3:
        job.record.short(f"kd_loss {name}: 3 times eager", f"{row['vs eager, captured']:.2f}")
    # `moved` counts student and teacher once; the backward pass reads both again.
    reached = row["share of copy"] * 5 / 3
    if moved >= BANDWIDTH_FROM and reached < 0.85:
        bar = f"kd_loss {name}: 85 % of copy bandwidth, bytes of both passes"
        job.record.short(bar, f"{100 * reached:.0f} %")


def liger(job: Job) -> None:
    """Liger's KL takes log-probabilities: torch's softmaxes around it are timed with it."""
    try:
        from liger_kernel.transformers import LigerKLDIVLoss
    except ImportError as error:
        job.record.missing(f"Liger-Kernel: {error}")
        return
    theirs, ours = LigerKLDIVLoss(reduction="batchmean"), KDLoss(temperature=4.0, alpha=0.9)
    if job.rehearse:
        theirs.eps = Interpreted(theirs.eps)
    sizes = [(8, 20)] if job.rehearse else [(256, 100), (1024, 1000), (1024, 21841)]
    for rows, classes in sizes:
        torch.manual_seed(0)
        student, teacher = 3 * torch.randn(2, rows, classes, device=job.device)
        labels = torch.randint(0, classes, (rows,), device=job.device)
        batch = student, teacher, labels

        def by_liger(s: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            soft = theirs((s / 4).log_softmax(-1), (t / 4).softmax(-1))
            return 0.1 * torch.nn.functional.cross_entropy(s, y) + 0.9 * 16 * soft

        sides = {"Liger": by_liger, "fastkd": ours}
        for name, side in sides.items():
            assert_loss_as_accurate(f"{name} {rows}x{classes}", side, eager_kd_loss, *batch)
        seconds = times(
            {name: forward_backward(side, *batch) for name, side in sides.items()},
            job.device,
            pairs=3 if job.rehearse else 60,
        )
        ratio = speedup(seconds, "Liger", "fastkd")
        medians = {f"{side} us": 1e6 * statistics.median(v) for side, v in seconds.items()}
        row = {"case": f"{rows}x{classes}", **medians, "ratio": ratio.median, "p10": ratio.p10}
        job.record.row("Liger", row)


class Interpreted(float):
    """A scalar with `to`, as in compiled kernels: Triton's interpreter hands over a plain float."""

    def to(self, _: Any) -> float:
        return float(self)
