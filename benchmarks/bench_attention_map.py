"""Attention-transfer loss, forward + backward: fastkd against eager torch and torch.compile.

    pytest benchmarks/bench_attention_map.py [--pairs 20] [--save-results]

Runs on the GPU when there is one. The ratios are medians (and 10th percentiles) of interleaved
pairs; the compiled baseline uses dynamic=False and is warm. Extra memory is the peak above the
features and the gradient at the student. A case whose loss or gradient is off fails before any
clock starts.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from fastkd.kernels import attention_loss
from fastkd.kernels._library import Core, Impl, core
from torch.profiler import ProfilerActivity, profile

from fastkd.testing import eager_attention_loss, gradient_of, interleave, speedup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STUDENT, TEACHER = (128, 32, 32, 32), (128, 128, 32, 32)
LAYOUTS, DTYPES = ["NCHW", "channels-last"], [torch.float32, torch.bfloat16]


def extra_bytes(run: Callable[[], object], gradient_bytes: int, device: str = DEVICE) -> int:
    """Peak of the memory that `run` takes from torch's allocator, without the gradient."""
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before - gradient_bytes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak - gradient_bytes


def sides_of(
    dtype: torch.dtype,
    layout: str,
    device: str,
    impl: Impl | None = None,
    shapes: tuple[tuple[int, ...], ...] = (STUDENT, TEACHER),
) -> tuple[dict[str, Callable[[], None]], int, int]:
    """Forward and backward of each side, the gate passed, bytes to move and of the gradient."""
    torch.manual_seed(0)
    order = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    student, teacher = (
        torch.randn(shape, device=device).to(dtype=dtype, memory_format=order) for shape in shapes
    )
    fused = partial(attention_loss, impl=impl)

    # The gate: both against fp64 arithmetic on the same inputs.
    wide = student.double(), teacher.double()
    want = gradient_of(eager_attention_loss, *wide)
    got = gradient_of(fused, student, teacher)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert (got.double() - want).norm() <= tolerance * want.norm()
    loss, truth = fused(student, teacher), eager_attention_loss(*wide)
    assert abs(loss.item() / truth.item() - 1) <= 1e-5

    # A fresh cache: past its recompile limit torch.compile would quietly run eager code.
    torch._dynamo.reset()
    compiled = torch.compile(eager_attention_loss, dynamic=False)
    student.requires_grad_()

    def step(function) -> Callable[[], None]:
        def run() -> None:
            function(student, teacher).backward()
            student.grad = None

        return run

    sides = {
        "eager": step(eager_attention_loss),
        "compile": step(compiled),
        "fastkd": step(fused),
    }
    # Both are read, the student once more in the backward pass, which writes its gradient.
    elements = 3 * student.numel() + teacher.numel()
    gradient_bytes = student.numel() * student.element_size()
    return sides, elements * student.element_size(), gradient_bytes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def bench_attention_loss(dtype, layout, table, benchmark, request) -> None:
    sides, _, gradient_bytes = sides_of(dtype, layout, DEVICE)
    seconds = interleave(sides, max(20, request.config.getoption("--pairs")))
    over_eager, eager_p10 = speedup(seconds, "eager", "fastkd")
    over_compile, compile_p10 = speedup(seconds, "compile", "fastkd")
    extra = {name: extra_bytes(run, gradient_bytes) for name, run in sides.items()}
    row = {
        "dtype": str(dtype).removeprefix("torch."),
        "layout": layout,
        **{f"{k} ms": 1e3 * sorted(v)[len(v) // 2] for k, v in seconds.items()},
        "vs compile": over_compile,
        "p10": compile_p10,
        "vs eager": over_eager,
        "p10 ": eager_p10,
        **{f"{k} extra MB": v / 1e6 for k, v in extra.items()},
        "share of eager's": extra["fastkd"] / extra["eager"],
    }
    table.rows.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(sides["fastkd"], rounds=3, warmup_rounds=1)


@pytest.mark.skipif(DEVICE == "cuda" or isinstance(core(), str), reason="needs the C++ core")
@pytest.mark.parametrize("layout", ["NCHW", "channels-last"])
def bench_attention_loss_each_instruction_set(layout, table, benchmark) -> None:
    """Every clone of the core by name: one that the compiler failed to vectorise shows here."""
    from fastkd.kernels.attention_map import cpu

    found = core()
    assert isinstance(found, Core)
    order = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    # One thread, and small enough for its cache: the main memory would make them alike.
    sides = [torch.randn(4, c, 16, 16).to(memory_format=order) for c in (32, 128)]

    def step(isa: str):
        def run() -> None:
            _, coefficients, _ = cpu.loss(*sides, 2, (1, 1), (1, 1), 1e-12, False, isa)
            cpu.energy_grad(sides[0], coefficients, None, 2, (1, 1), isa)

        return run

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = interleave({isa: step(isa) for isa in found.isas}, 100)
    finally:
        torch.set_num_threads(threads)
    medians = {isa: round(1e3 * sorted(values)[50], 3) for isa, values in seconds.items()}
    table.notes.append(f"core alone, {layout} fp32 in cache, ms by instruction set: {medians}")
    widest = medians[found.isas[0]]
    assert all(widest <= 1.1 * other for other in medians.values()), medians
    benchmark.pedantic(step(found.isas[0]), rounds=3)
