"""Distillation loss, forward and backward: fastkd against eager torch and torch.compile.

    pytest benchmarks/bench_kd_loss.py [--pairs 20] [--save-results]

Runs on the GPU if there is one. A case whose loss or gradient is less accurate than allowed fails
before any clock starts.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from fastkd.kernels import kd_loss_mean
from fastkd.kernels._library import Impl
from fastkd.losses import KDLoss
from fastkd.testing import (
    assert_loss_as_accurate,
    eager_kd_loss,
    forward_backward,
    freshly_compiled,
    shape_id,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(64, 100), (256, 100), (256, 1000), (1024, 1000), (1024, 21841), (4, 19, 256, 512)]
DTYPES = [torch.float32, torch.bfloat16]


def sides_of(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, impl: Impl | None = None
) -> tuple[dict[str, Callable[[], None]], int]:
    """Forward and backward pass of each side, checked, and the bytes that have to move."""
    torch.manual_seed(0)
    student = (3 * torch.randn(shape, device=device)).to(dtype)
    teacher = (3 * torch.randn(shape, device=device)).to(dtype)
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), device=device)
    loss = KDLoss(temperature=4.0, alpha=0.9)
    if impl is not None:  # the module leaves the choice to the dispatcher
        loss = partial(kd_loss_mean, class_dim=1, impl=impl)
    assert_loss_as_accurate("kd_loss", loss, eager_kd_loss, student, teacher, labels)
    sides = {"eager": eager_kd_loss, "compile": freshly_compiled(eager_kd_loss), "fastkd": loss}
    timed = {name: forward_backward(side, student, teacher, labels) for name, side in sides.items()}
    # Student and teacher are read and the gradient is written once.
    return timed, 3 * student.numel() * student.element_size()


@pytest.fixture(scope="module", autouse=True)
def _geometric_means(table) -> Iterator[None]:
    """The last rows of the table."""
    yield
    for dtype in ("float32", "bfloat16"):
        rows = [row for row in table.rows if row["dtype"] == dtype]
        if rows:
            blank = dict.fromkeys(rows[0], "")
            means = {
                name: math.exp(sum(math.log(row[name]) for row in rows) / len(rows))
                for name in ("vs eager", "vs compile")
            }
            table.rows.append({**blank, "shape": "geomean", "dtype": dtype, **means})


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def bench_kd_loss(shape, dtype, table, race) -> None:
    sides, moved_bytes = sides_of(shape, dtype, DEVICE)
    found = race(sides, repeat=10 if math.prod(shape) < 1 << 20 else 1)
    table.rows.append(
        {
            "shape": shape_id(shape),
            "dtype": str(dtype).removeprefix("torch."),
            **found.cells(),
            "fastkd GB/s": moved_bytes / found.ms("fastkd") / 1e6,
        }
    )
