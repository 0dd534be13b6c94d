"""Losses per pixel, forward and backward: fastkd's terms against eager torch, and their memory.

    pytest benchmarks/bench_dense_loss.py [--part PART] [--pairs 20] [--save-results]

Parts: time, and memory, the extra memory of a forward and a backward pass. Losses: kd+ce, the KL at
T 4 and the cross entropy with class weights and ignored pixels as one term, as a recipe has it;
kd and ce, each alone. A case whose loss or gradient is less accurate than allowed fails before any
clock starts.

The extra memory is the peak of a process that holds inputs, weights and a gradient already, above
what it holds then: scratch of the kernels included, and whatever torch allocates inside an op.
"""

import ctypes
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastkd.losses import KD, CrossEntropy
from fastkd.testing import (
    assert_loss_as_accurate,
    bind_term,
    call_term,
    eager_dense_loss,
    forward_backward,
    shape_id,
)

SHAPES = [(4, 19, 256, 512), (2, 150, 128, 128)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Factors of the KL and of the cross entropy.
LOSSES = {"kd+ce": (0.9, 0.1), "kd": (0.9, 0.0), "ce": (0.0, 1.0)}
SIDES = ("eager", "fastkd")
BARS = {"vs eager": 2.0, "fastkd / eager": 0.1}

Shape = tuple[int, ...]


def inputs_of(shape: Shape, dtype: str, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher, and labels, a tenth of them -100 (the last rows of pixels)."""
    torch.manual_seed(0)
    student, teacher = (
        (3 * torch.randn(shape)).to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
        for _ in range(2)
    )
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    labels[:, -max(1, shape[2] // 10) :] = -100
    return student, teacher, labels


def sides_of(loss: str, shape: Shape) -> dict[str, Callable[..., Tensor]]:
    """`side(student, teacher, labels)` of eager torch and of the terms of a recipe."""
    kd_weight, ce_weight = LOSSES[loss]
    weights = tuple(1.5 + 8.5 * c / shape[1] for c in range(shape[1]))
    if kd_weight:
        given = {"class_weights": weights} if ce_weight else {}
        term = KD(weight=kd_weight, ce_weight=ce_weight, temperature=4.0, **given)
    else:
        term = CrossEntropy(weight=ce_weight, class_weights=weights)
    shapes = {need: torch.empty(1, *shape[1:]) for need in term.needs}
    bind_term(term, shapes, num_classes=shape[1])
    weight_C = torch.tensor(weights)

    def fastkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        tensors = {"x/student/logits": student, "x/teacher/logits": teacher}
        parts = call_term(term, tensors, labels).parts
        values = [weight * parts[part] for part, weight in term.weights.items()]
        return values[0] if len(values) == 1 else values[0] + values[1]

    def eager(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return eager_dense_loss(
            student, teacher, labels, weight_C, kd_weight=kd_weight, ce_weight=ce_weight
        )

    return {"eager": eager, "fastkd": fastkd}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fewer cases with --quick."""
    quick = metafunc.config.getoption("--quick")
    if "shape" in metafunc.fixturenames:
        shapes = [(1, 19, 32, 64)] if quick else SHAPES
        metafunc.parametrize("layout", LAYOUTS)
        metafunc.parametrize("dtype", DTYPES)
        metafunc.parametrize("shape", shapes, ids=[shape_id(one) for one in shapes])
        metafunc.parametrize("loss", LOSSES)


@pytest.fixture(scope="module", autouse=True)
def _worst(table) -> Iterator[None]:
    """The row of each kind that is nearest to its bar, as a note under the tables."""
    yield
    for column, bar in BARS.items():
        rows = [row for row in table.rows if column in row]
        if rows:
            worst = (max if bar < 1 else min)(rows, key=lambda row: row[column])
            case = ", ".join(str(worst[key]) for key in ("loss", "shape", "dtype", "layout"))
            table.notes.append(f"Worst {column}: {worst[column]:.3g} (bar {bar:g}), {case}.")


def bench_time(loss, shape, dtype, layout, table, race) -> None:
    student, teacher, labels = inputs_of(shape, dtype, layout)
    sides = sides_of(loss, shape)
    assert_loss_as_accurate(loss, sides["fastkd"], sides["eager"], student, teacher, labels)
    found = race({s: forward_backward(sides[s], student, teacher, labels) for s in SIDES})
    case = {"loss": loss, "shape": shape_id(shape), "dtype": dtype, "layout": layout}
    ratio = found.ratio("eager")
    table.rows.append(
        {
            **case,
            **{f"{side} ms": found.ms(side) for side in SIDES},
            "vs eager": ratio.median,
            "p10": ratio.p10,
            "p90": ratio.p90,
        }
    )


def bench_memory(loss, shape, dtype, layout, table) -> None:
    words = (loss, ",".join(map(str, shape)), dtype, layout)
    mib = {}
    for side in SIDES:
        done = subprocess.run(
            [sys.executable, __file__, side, *words], capture_output=True, text=True, check=True
        )
        mib[side] = float(done.stdout)
    case = {"loss": loss, "shape": shape_id(shape), "dtype": dtype, "layout": layout}
    logits = math.prod(shape) * DTYPES[dtype].itemsize / 2**20
    extra = {f"{side} MiB": mib[side] for side in SIDES}
    share = {"fastkd / eager": mib["fastkd"] / mib["eager"]}
    table.rows.append({**case, "logits MiB": logits, **extra, **share})


def main(side: str, loss: str, sizes: str, dtype: str, layout: str) -> None:
    """Print the extra memory of one forward and backward pass in MiB."""
    # Every block of 64 KiB or more comes from the kernel and goes back to it: mallopt's threshold.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    shape = tuple(map(int, sizes.split(",")))
    run = sides_of(loss, shape)[side]
    # Threads, code and what torch makes on first use.
    small = inputs_of((1, shape[1], 16, 16), dtype, layout)
    forward_backward(run, *small)()
    student, teacher, labels = inputs_of(shape, dtype, layout)
    student.requires_grad_()
    held = in_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run(student, teacher, labels).backward()
    assert student.grad is not None
    gradient = student.grad.numel() * student.grad.element_size() / 2**20
    print(in_mib("VmHWM") - held - gradient)


def in_mib(name: str) -> float:
    """A size that Linux states of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(one for one in lines if one.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
