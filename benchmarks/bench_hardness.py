"""From two logit matrices to the rows of the harder half: fastkd against eager and torch.compile.

    pytest benchmarks/bench_hardness.py [--pairs 20] [--save-results]

`select_hardest(hardness(student, teacher), N // 2)` against the eager formula and torch.topk, which
leaves the order of ties open. Runs on the GPU if there is one. A case whose scores or choice are
less accurate than allowed fails before any clock starts.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastkd.kernels import hardness, select_hardest
from fastkd.kernels._library import Impl
from fastkd.testing import assert_as_accurate, eager_hardness, freshly_compiled, shape_id, ulp

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
    """The choice by each side, checked, and the bytes that have to move."""
    torch.manual_seed(0)
    rows, classes = pool
    student, teacher = (3 * torch.randn(2, *pool, device=device)).to(dtype)
    labels = torch.randint(0, classes, (rows,), device=device)
    k = rows // 2

    def fastkd_scores() -> Tensor:
        return hardness(student, teacher, labels, criterion=criterion, impl=impl)

    def fastkd_pick() -> Tensor:
        return select_hardest(fastkd_scores(), k, impl=impl).index

    def eager_pick() -> Tensor:
        return eager_hardness(student, teacher, labels, criterion).topk(k).indices

    scores = fastkd_scores()
    eager = eager_hardness(student.float(), teacher.float(), labels, criterion)
    truth = eager_hardness(student.double(), teacher.double(), labels, criterion)
    assert_as_accurate(criterion, scores, eager, truth, floor=ulp(truth))
    # The choice: exactly by the scores, and in truth as hard as the eager choice.
    picked = fastkd_pick()
    assert torch.equal(picked, scores.sort(descending=True, stable=True).indices[:k])
    best = truth.topk(k).values.mean()
    mean_of = {"fastkd": truth[picked].mean(), "eager": truth[eager.topk(k).indices].mean()}
    assert_as_accurate("choice", mean_of["fastkd"], mean_of["eager"], best, floor=ulp(best))

    sides = {"eager": eager_pick, "compile": freshly_compiled(eager_pick), "fastkd": fastkd_pick}
    read = 2 if criterion == "kl" else 1
    return sides, read * student.numel() * student.element_size()


@pytest.mark.parametrize(("pool", "criterion", "dtype"), CASES, ids=str)
def bench_hardness(pool, criterion, dtype, table, race) -> None:
    rows, classes = pool
    sides, _ = sides_of(pool, criterion, dtype, DEVICE)
    with torch.no_grad():
        found = race(sides, repeat=10 if rows * classes < 1 << 20 else 1)
    table.rows.append(
        {
            "pool": shape_id(pool),
            "criterion": criterion,
            "dtype": str(dtype).removeprefix("torch."),
            **found.cells(),
        }
    )
