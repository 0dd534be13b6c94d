"""benchmarks/bench_grouped_pointwise.py: its quick path from end to end, and the parts it uses."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastkd.models.planner.measure import Tensors, plain
from fastkd.models.planner.spec import BlockSpec, Case

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = BENCHMARKS / "bench_grouped_pointwise.py"
CPU = torch.device("cpu")
SPECS = [
    BlockSpec(6, 10, groups=3, stride=2),
    BlockSpec(6, 6, 6, before="relu", after="relu", residual=True, activate_sum=True),
    BlockSpec(4, 4, 24, 24, "relu6", "relu6", after="none", residual=True),
    BlockSpec(6, 6, groups=2, dilation=2, padding=2, after="relu", residual=True),
]


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module("block_cases")


def run(*words: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PROGRAM)]
    # In a worker of xdist pytest-benchmark reads no clock.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [*command, "--quick", *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "A rehearsal with --quick: too few turns" in done.stdout
    return done.stdout


def columns(table: str, first: str) -> set[str]:
    head = next(line for line in table.splitlines() if line.startswith(f"| {first} |"))
    return {cell.strip() for cell in head.strip("|").split("|")}


@pytest.mark.matrix
def test_the_picture_has_the_columns_that_its_page_reads() -> None:
    table = run("--part", "picture")
    wanted = {"block", "mode", "MMACs an image", "batch", "plain ms", "fastkd ms"}
    assert wanted <= columns(table, "block")
    assert "| training |" in table and "| inference |" in table


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "first", "wanted"),
    [
        ("shapes", "block", {"eager ms", "compile ms", "fastkd ms", "vs best", "planner"}),
        ("inference", "block", {"eager NCHW ms", "fastkd ms", "vs best", "planner"}),
        ("steps", "network", {"plain ms", "fastkd ms", "vs plain", "p10 vs plain"}),
        ("memory", "step", {"kernels", "built MiB", "peak MiB", "step MiB"}),
    ],
)
def test_every_part_is_rehearsed(part: str, first: str, wanted: set[str]) -> None:
    assert wanted <= columns(run("--part", part), first)


def test_a_part_that_does_not_exist_names_those_that_do() -> None:
    command = [sys.executable, "-m", "pytest", str(PROGRAM), "--part", "speed", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4
    assert "there is no part speed; choose of inference_erfnet" in done.stderr


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_onnxruntime_computes_the_same_block(spec: BlockSpec, cases: ModuleType) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    session_of = import_module("block_onnx").session_of
    case = Case(spec, (2, spec.in_channels, 7, 9), torch.float32, CPU, False, False)
    given = Tensors.of(case)
    # Norms that are not 1 and 0.
    drawn = {name: torch.rand(spec.channels) + 0.5 for name in ("weight", "bias", "running_var")}
    given = replace(given, norm=replace(given.norm, **drawn))
    got = torch.from_numpy(session_of(spec, given)())
    exact = plain(spec, cases.converted(given, torch.float64))
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_side_that_is_wrong_is_not_raced(training: bool, cases: ModuleType) -> None:
    case = Case(SPECS[1], (2, 6, 7, 9), torch.float32, CPU, training, training)
    sides = cases.sides_of(case)
    cases.check("right", case, sides)
    given = Tensors.of(case)
    wrong = cases.Side(given, lambda: 1.001 * plain(SPECS[1], given))
    with pytest.raises(AssertionError, match="wrong, output: RMS error"):
        cases.check("wrong", case, {**cases.sides_of(case), "fastkd": wrong})


def test_saved_bytes_are_those_of_activations(cases: ModuleType) -> None:
    """relu(x W) keeps x and its own output, and the weights are not counted."""
    case = Case(SPECS[0], (2, 6, 7, 9), torch.float32, CPU, True, True)
    given = Tensors.of(case)
    sizes = [2 * 6 * 7 * 9, 2 * 10 * 7 * 9]
    found = cases.saved_bytes(
        case, lambda: torch.conv2d(given.x_NCHW, given.pointwise).relu(), given
    )
    assert found == 4 * sum(sizes)


def test_all_blocks_of_the_picture_are_those_of_the_paper(cases: ModuleType) -> None:
    import json

    oracle = json.loads((BENCHMARKS.parent / "tests/models/moonshine_oracle.json").read_text())
    printed = [row["block"] for row in oracle["table2"] if row["network"] == "WRN-40-2"]
    assert sorted(import_module("block_networks").TABLE_1) == sorted(printed)
