"""Distillation loss, forward + backward: fastkd against eager torch and torch.compile.

    pytest benchmarks/bench_kd_loss.py [--pairs 20] [--save-results]

Runs on the GPU when there is one. The ratios are medians (and 10th percentiles) of interleaved
pairs; compiled baselines use dynamic=False and are warm. A case whose loss or gradient is off
fails before any clock starts.
"""

import math
from collections.abc import Callable
from functools import partial
from importlib import import_module

import pytest
import torch
from fastkd.kernels import kd_loss_mean
from fastkd.kernels._library import Core, Impl, core

from fastkd.losses import KDLoss
from fastkd.testing import eager_kd_loss, gradient_of, interleave, speedup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(64, 100), (256, 100), (256, 1000), (1024, 1000), (1024, 21841), (4, 19, 256, 512)]
DTYPES = [torch.float32, torch.bfloat16]


def sides_of(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, impl: Impl | None = None
) -> tuple[dict[str, Callable[[], None]], int]:
    """Forward and backward of each side, the gate passed, and the bytes that have to move."""
    torch.manual_seed(0)
    student = (3 * torch.randn(shape, device=device)).to(dtype)
    teacher = (3 * torch.randn(shape, device=device)).to(dtype)
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), device=device)
    loss = KDLoss(temperature=4.0, alpha=0.9)
    if impl is not None:  # the module leaves the choice to the dispatcher
        loss = partial(kd_loss_mean, class_dim=1, impl=impl)

    # The gate: both against fp32 arithmetic on the same inputs.
    wide = student.float(), teacher.float()
    want = gradient_of(eager_kd_loss, *wide, labels)
    got = gradient_of(loss, student, teacher, labels).float()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    assert (got - want).norm() <= tolerance * want.norm()
    torch.testing.assert_close(
        loss(student, teacher, labels), eager_kd_loss(*wide, labels), rtol=1e-4, atol=0
    )

    # A fresh cache: past its recompile limit torch.compile would quietly run eager code.
    torch._dynamo.reset()
    compiled_kd_loss = torch.compile(eager_kd_loss, dynamic=False)
    student.requires_grad_()

    def step(function):
        def run() -> None:
            function(student, teacher, labels).backward()
            student.grad = None

        return run

    sides = {
        "eager": step(eager_kd_loss),
        "compile": step(compiled_kd_loss),
        "fastkd": step(loss),
    }
    # Student and teacher are read and the gradient is written once.
    return sides, 3 * student.numel() * student.element_size()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def bench_kd_loss(shape, dtype, table, benchmark, request) -> None:
    sides, moved_bytes = sides_of(shape, dtype, DEVICE)
    pairs = max(20, request.config.getoption("--pairs"))
    small = math.prod(shape) < 1 << 20
    seconds = interleave(sides, pairs * (10 if small else 1))
    over_eager, eager_p10 = speedup(seconds, "eager", "fastkd")
    over_compile, compile_p10 = speedup(seconds, "compile", "fastkd")
    best = sorted(seconds["fastkd"])
    row = {
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{k} ms": 1e3 * sorted(v)[len(v) // 2] for k, v in seconds.items()},
        "vs compile": over_compile,
        "p10": compile_p10,
        "vs eager": over_eager,
        "p10 ": eager_p10,
        "fastkd GB/s": moved_bytes / best[len(best) // 2] / 1e9,
    }
    table.rows.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(sides["fastkd"], rounds=3, warmup_rounds=1)


@pytest.mark.skipif(DEVICE == "cuda" or isinstance(core(), str), reason="needs the C++ core")
def bench_kd_loss_each_instruction_set(table, benchmark) -> None:
    """Every clone of the core by name: one that the compiler failed to vectorise shows here."""
    from fastkd.kernels.kd_loss import cpu

    found = core()
    assert isinstance(found, Core)
    student, teacher = 3 * torch.randn(2, 256, 1000)
    labels = torch.randint(0, 1000, (256,))
    out, loss, divisor = torch.empty_like(student), torch.empty(()), torch.empty(())

    def step(isa: str):
        return lambda: cpu._call(
            student, [teacher], labels, None, None, 4.0, 0.0, -100, -1,
            out=out, loss=loss, divisor=divisor, isa=isa,
        )  # fmt: skip

    seconds = interleave({isa: step(isa) for isa in found.isas}, 100)
    medians = {isa: 1e3 * sorted(values)[50] for isa, values in seconds.items()}
    table.notes.append(f"core alone, 256x1000 fp32, ms by instruction set: {medians}")
    widest = medians[found.isas[0]]
    assert all(widest <= 1.05 * other for other in medians.values()), medians
    benchmark.pedantic(step(found.isas[0]), rounds=3)


def bench_kd_loss_geomean(table, benchmark) -> None:
    """Last in the file: the geometric means over the cases above."""
    for dtype in ("float32", "bfloat16"):
        rows = [row for row in table.rows if row["dtype"] == dtype]
        if not rows:
            continue
        means = {
            name: math.exp(sum(math.log(row[name]) for row in rows) / len(rows))
            for name in ("vs compile", "vs eager")
        }
        blank = dict.fromkeys(table.rows[0], "")
        table.rows.append({**blank, "shape": "geomean", "dtype": dtype, **means})
        benchmark.extra_info[dtype] = means
    benchmark.pedantic(import_module, args=("fastkd.losses.drop_in",), rounds=1)
