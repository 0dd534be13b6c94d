"""Cheap blocks: fused against plain torch, torch.compile and onnxruntime; whole steps; memory.

    pytest benchmarks/bench_grouped_pointwise.py --part PART [--quick] [--save-results]

Parts, each below 8 minutes on two cores:

- shapes_wrn, shapes_mobilenetv2, shapes_erfnet: a training pass of one block, forward, and forward
  and backward; --save-results also writes fastkd/models/planner/costs.json.
- inference_wrn, inference_mobilenetv2, inference_erfnet: one block in eval mode, batch 1 and 32.
- steps_wrn, steps_others: whole training steps, the student alone and with a live teacher.
- memory: what a block keeps for its backward pass, and the peak of a whole step.
- picture: a step and a forward pass of WRN-40-2 with every block of Moonshine's table 1, for
  `python docs/make_cheap_blocks.py`.

"vs best" is the time of the fastest rival in torch over fastkd's, paired by turn; "planner" is the
kind that the planner's rule picks from the samples of eager torch in channels-last and of fastkd.
A case is raced only after its values have passed the check against float64.
"""

import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastkd.models.planner.costs import cost_of, replace_costs
from fastkd.models.planner.decide import sure_winner
from fastkd.models.planner.measure import fused
from fastkd.models.planner.spec import Case, Kind
from fastkd.testing import assert_as_accurate

sys.path.append(str(Path(__file__).parent))

import block_cases
import block_networks
import block_onnx

KINDS: dict[str, Kind] = {"fastkd": "fused", "eager": "plain"}
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fewer cases with --quick."""
    quick = metafunc.config.getoption("--quick")
    part = metafunc.function.__name__.removeprefix("bench_")
    if "block" in metafunc.fixturenames:
        network = part.partition("_")[2]
        found = block_cases.blocks(network, quick=quick)
        metafunc.parametrize("block", found, ids=[one.where for one in found])
    if "dtype" in metafunc.fixturenames:
        dtypes = block_cases.DTYPES
        metafunc.parametrize("dtype", dtypes, ids=[DTYPE_NAMES[one] for one in dtypes])
    if "batch" in metafunc.fixturenames:
        metafunc.parametrize("batch", [1] if quick else [1, 32])
    if "student" in metafunc.fixturenames:
        found = block_networks.students(part, quick=quick)
        metafunc.parametrize("student", found, ids=[one.title for one in found])


@pytest.fixture(scope="module", autouse=True)
def _measured_anew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The planner knows nothing that it measured earlier, on a machine that may have been busy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTKD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _means(table: Any) -> Iterator[None]:
    """Geometric means, as notes under the tables."""
    yield
    groups: dict[str, list[float]] = {}
    for row in table.rows:
        if "vs best" in row:
            words = (row["mode"], row["dtype"], f"{row['cpg']} channels a group")
            for name in (", ".join(words[:2]), ", ".join(words)):
                groups.setdefault(f"vs best, {name}", []).append(row["vs best"])
                if "vs onnxruntime" in row:
                    groups.setdefault(f"vs onnxruntime, {name}", []).append(row["vs onnxruntime"])
    for name, ratios in groups.items():
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        table.notes.append(f"Geometric mean {name}: {mean:.2f} ({len(ratios)} cases).")


@pytest.fixture(scope="module")
def costs(request: pytest.FixtureRequest) -> Iterator[list[tuple[Case, Mapping[Kind, float]]]]:
    """Cases with their milliseconds, for costs.json."""
    found: list[tuple[Case, dict[Kind, float]]] = []
    yield found
    if request.config.getoption("--save-results"):
        replace_costs(cost_of(case, ms) for case, ms in found)


RIVALS = ("eager", "eager NCHW", "compile")


def shape_row(found: Any) -> dict[str, Any]:
    """Times of all sides, and cells about the best rival in torch and about the planner."""
    best = min(RIVALS, key=found.ms)
    ratio = found.ratio(best)
    chosen = sure_winner({kind: found.seconds[side] for side, kind in KINDS.items()})
    side = next(side for side, kind in KINDS.items() if kind == chosen)
    planned = found.ratio("eager", of=side)
    row = {f"{side} ms": found.ms(side) for side in found.seconds}
    row |= {"best": best, "vs best": ratio.median, "p10 vs best": ratio.p10}
    if "onnxruntime" in found.seconds:
        onnx = found.ratio("onnxruntime")
        row |= {"vs onnxruntime": onnx.median, "p10 vs onnxruntime": onnx.p10}
    return row | {"planner": chosen, "planner vs plain": planned.median, "p10 planner": planned.p10}


def race_shape(block: Any, dtype: torch.dtype, mode: Any, fixtures: tuple[Any, ...]) -> None:
    """Check and race one block in training."""
    table, race, costs, quick = fixtures
    network = next(n for n, make in block_cases.NETWORKS.items() if quick or block in make())
    batch = 2 if quick else block_cases.BATCH[network]
    case = block.case(batch, dtype, training=True)
    sides = block_cases.checked_sides(block.where, case)
    found = race(block_cases.runs_of(case, sides, mode))
    if mode == "forward+backward":
        costs.append((case, {KINDS[side]: found.ms(side) for side in KINDS}))
    table.rows.append(
        {
            "block": block.where,
            "cpg": case.spec.channels // case.spec.groups,
            "batch": batch,
            "mode": mode,
            "dtype": DTYPE_NAMES[dtype],
            **shape_row(found),
        }
    )


MODES = pytest.mark.parametrize("mode", ["forward", "forward+backward"])


@pytest.fixture
def fixtures(table: Any, race: Any, costs: Any, request: pytest.FixtureRequest) -> tuple[Any, ...]:
    return table, race, costs, request.config.getoption("--quick")


@MODES
def bench_shapes_wrn(block, dtype, mode, fixtures) -> None:
    race_shape(block, dtype, mode, fixtures)


@MODES
def bench_shapes_mobilenetv2(block, dtype, mode, fixtures) -> None:
    race_shape(block, dtype, mode, fixtures)


@MODES
def bench_shapes_erfnet(block, dtype, mode, fixtures) -> None:
    race_shape(block, dtype, mode, fixtures)


def race_inference(block: Any, dtype: torch.dtype, batch: int, fixtures: tuple[Any, ...]) -> None:
    """Check and race one block in eval mode, onnxruntime included where it computes in fp32."""
    table, race, costs, _ = fixtures
    case = block.case(batch, dtype, training=False)
    sides = block_cases.checked_sides(block.where, case)
    runs: dict[str, Any] = dict(block_cases.runs_of(case, sides, "inference"))
    if dtype == torch.float32:
        try:
            runs["onnxruntime"] = onnx_side(block.where, case)
        except ImportError as missing:
            table.notes.append(f"Without onnxruntime: {missing}.")
    found = race(runs, repeat=2)
    costs.append((case, {KINDS[side]: found.ms(side) for side in KINDS}))
    table.rows.append(
        {
            "block": block.where,
            "cpg": case.spec.channels // case.spec.groups,
            "batch": batch,
            "mode": "inference",
            "dtype": DTYPE_NAMES[dtype],
            **shape_row(found),
        }
    )


def onnx_side(name: str, case: Case) -> Any:
    """A session that computes the same numbers."""
    given = block_cases.Tensors.of(case)
    run = block_onnx.session_of(case.spec, given)
    wide = block_cases.converted(given, torch.float64)
    truth = block_cases.plain(case.spec, wide)
    eager = block_cases.plain(case.spec, given)
    got = torch.from_numpy(np.array(run()))
    # Folding the norms into the weights rounds once more.
    assert_as_accurate(f"{name}, onnxruntime", got, eager, truth, factor=4)
    return run


def bench_inference_wrn(block, dtype, batch, fixtures) -> None:
    race_inference(block, dtype, batch, fixtures)


def bench_inference_mobilenetv2(block, dtype, batch, fixtures) -> None:
    race_inference(block, dtype, batch, fixtures)


def bench_inference_erfnet(block, dtype, batch, fixtures) -> None:
    race_inference(block, dtype, batch, fixtures)


def race_steps(student: Any, table: Any, race: Any) -> None:
    """A whole training step: forward, cross entropy, backward, SGD."""
    steps = block_networks.steps_of(student)
    found = race(steps)
    row = {"network": student.title, "images": student.text, **found.cells()}
    table.rows.append(row)


def bench_steps_wrn(student, table, race) -> None:
    race_steps(student, table, race)


def bench_steps_others(student, table, race) -> None:
    race_steps(student, table, race)


def bench_steps_teacher(student, table, race) -> None:
    """Distillation from a live WRN-40-2; the teacher's share is that of its forward pass."""
    found = race(block_networks.distilling_steps_of(student))
    shares = {
        f"teacher's share, {side}": found.ms("teacher") / found.ms(side)
        for side in ("plain", "fastkd")
    }
    row = {"network": student.title, "images": student.text, **found.cells()}
    table.rows.append(row | shares)


def bench_memory_block(table, request) -> None:
    """Bytes kept for the backward pass, over those of the plain modules; the bar is 0.6."""
    for block in block_cases.blocks("wrn", quick=request.config.getoption("--quick")):
        case = block.case(block_cases.BATCH["wrn"], torch.float32, training=True)
        given, spec = block_cases.Tensors.of(case), block.spec
        forwards = {
            "plain": lambda g=given, s=spec: block_cases.plain(s, g),
            "fused": lambda g=given, s=spec: fused(s, g),
            "recompute": lambda g=given, s=spec: fused(s, g, recompute="on"),
        }
        sizes = {
            name: block_cases.saved_bytes(case, forward, given)
            for name, forward in forwards.items()
        }
        shares = {f"{name} / plain": sizes[name] / sizes["plain"] for name in forwards}
        mib = {f"{name} MiB": size / 2**20 for name, size in sizes.items()}
        table.rows.append({"block": block.where, **mib, **shares})


def bench_memory_step(table, request) -> None:
    """Peak of a process that makes steps of WRN-40-2 with G(4), and of one that only builds it."""
    batch = "2" if request.config.getoption("--quick") else "64"
    program = Path(__file__).with_name("block_networks.py")
    for kernels in block_networks.KERNELS:
        done = subprocess.run(
            [sys.executable, program, kernels, batch], capture_output=True, text=True, check=True
        )
        built, peak = map(float, done.stdout.split())
        row = {"step": f"WRN-40-2 G(4), batch {batch}", "kernels": kernels}
        table.rows.append(row | {"built MiB": built, "peak MiB": peak, "step MiB": peak - built})


@pytest.mark.parametrize("mode", ["training", "inference"])
def bench_picture(student, mode, table, race) -> None:
    """A row of the picture."""
    steps = block_networks.steps_of if mode == "training" else block_networks.forwards_of
    found = race(steps(replace(student, dense=False)))
    table.rows.append(
        {
            "block": student.block,
            "mode": mode,
            "MMACs an image": block_networks.macs_of(student) / 1e6,
            "batch": student.batch,
            **found.cells(),
        }
    )
