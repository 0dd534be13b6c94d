"""From two logit matrices to the rows of the harder half: fastkd against eager and torch.compile.

    pytest benchmarks/bench_hardness.py [--pairs 20] [--save-results]

`select_hardest(hardness(student, teacher), N // 2)` against the eager formula and torch.topk, whose
order of ties is left open. Runs on the GPU when there is one. The ratios are medians (and 10th
percentiles) of interleaved pairs; compiled baselines use dynamic=False and are warm. A case whose
scores or choice are off fails before any clock starts.
"""

from collections.abc import Callable

import pytest
import torch
from fastkd.kernels import hardness, select_hardest
from fastkd.kernels._library import Core, Impl, core
from torch import Tensor

from fastkd.testing import assert_as_accurate, eager_hardness, interleave, rms, speedup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POOLS = [(128, 100), (512, 1000), (4096, 1000)]
CASES = [
    *((pool, "kl", dtype) for dtype in (torch.float32, torch.bfloat16) for pool in POOLS),
    *(
        ((512, 1000), criterion, torch.float32)
        for criterion in ("teacher_entropy", "cross_entropy", "margin")
    ),
]


def sides_of(
    pool: tuple[int, int],
    criterion: str,
    dtype: torch.dtype,
    device: str,
    impl: Impl | None = None,
) -> tuple[dict[str, Callable[[], Tensor]], int]:
    """The choice by each side, the gate passed, and the bytes that have to move."""
    torch.manual_seed(0)
    rows, classes = pool
    student, teacher = (3 * torch.randn(2, *pool, device=device)).to(dtype)
    labels = torch.randint(0, classes, (rows,), device=device)
    arguments, k = (student, teacher, labels), rows // 2

    def fastkd_pick() -> Tensor:
        scores = hardness(*arguments, criterion=criterion, impl=impl)
        return select_hardest(scores, k, impl=impl).index

    def eager_pick() -> Tensor:
        return eager_hardness(*arguments, criterion).topk(k).indices

    # The gate: scores by error against float64, the choice by the scores it was made from.
    scores = hardness(*arguments, criterion=criterion, impl=impl)
    eager = eager_hardness(student.float(), teacher.float(), labels, criterion)
    truth = eager_hardness(student.double(), teacher.double(), labels, criterion)
    floor = torch.finfo(torch.float32).eps * rms(truth)
    assert_as_accurate(criterion, scores, eager, truth, floor=floor)
    picked = fastkd_pick()
    assert torch.equal(picked, scores.sort(descending=True, stable=True).indices[:k])
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    best = eager_hardness(*arguments, criterion).topk(k).values.double().sum()
    torch.testing.assert_close(truth[picked].sum(), best, rtol=tolerance, atol=0)

    # A fresh cache: past its recompile limit torch.compile would quietly run eager code.
    torch._dynamo.reset()
    compiled_pick = torch.compile(eager_pick, dynamic=False)
    sides = {"eager": eager_pick, "compile": compiled_pick, "fastkd": fastkd_pick}
    read = 2 if criterion == "kl" else 1
    return sides, read * student.numel() * student.element_size()


@pytest.mark.parametrize(("pool", "criterion", "dtype"), CASES, ids=str)
def bench_hardness(pool, criterion, dtype, table, benchmark, request) -> None:
    rows, classes = pool
    sides, _ = sides_of(pool, criterion, dtype, DEVICE)
    with torch.no_grad():
        pairs = max(20, request.config.getoption("--pairs"))
        seconds = interleave(sides, pairs * (10 if rows * classes < 1 << 20 else 1))
    over_eager, eager_p10 = speedup(seconds, "eager", "fastkd")
    over_compile, compile_p10 = speedup(seconds, "compile", "fastkd")
    row = {
        "pool": f"{rows}x{classes}",
        "criterion": criterion,
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{name} us": 1e6 * sorted(v)[len(v) // 2] for name, v in seconds.items()},
        "vs eager": over_eager,
        "p10": eager_p10,
        "vs compile": over_compile,
        "p10 ": compile_p10,
    }
    table.rows.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(sides["fastkd"], rounds=3, warmup_rounds=1)


@pytest.mark.skipif(DEVICE == "cuda" or isinstance(core(), str), reason="needs the C++ core")
def bench_hardness_each_instruction_set(table, benchmark) -> None:
    """Every clone of the core by name: one that the compiler failed to vectorise shows here."""
    from fastkd.kernels.hardness import cpu

    found = core()
    assert isinstance(found, Core)
    student, teacher = 3 * torch.randn(2, 512, 1000)

    def score(isa: str):
        return lambda: cpu.hardness(student, teacher, None, "kl", 4.0, isa=isa)

    seconds = interleave({isa: score(isa) for isa in found.isas}, 100)
    medians = {isa: round(1e6 * sorted(values)[50]) for isa, values in seconds.items()}
    table.notes.append(f"kl scores alone, 512x1000 fp32, us by instruction set: {medians}")
    assert all(medians[found.isas[0]] <= 1.05 * other for other in medians.values()), medians
    benchmark.pedantic(score(found.isas[0]), rounds=3)
