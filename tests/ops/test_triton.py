"""The Triton kernels without a GPU: interpreted on each op's test matrix, compiled offline.

Interpreter and compiler need processes of their own: the switch is read when Triton is imported.
An op takes part by its tests, its triton_cases_<op>.py and a line of OPS. By default both see a
share of the cases, with `-m matrix` the rest.
"""

import json
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
KERNELS = Path(__file__).parents[2] / "kernels"
PAGE = KERNELS.parent / "docs" / "kernels.md"


# op: test files that the interpreter runs, and how many of their tests must pass at least: by
# default, and in the matrix. benchmarks/gpu.py reads the files here.
OPS = {
    "attention_map": (["test_attention_map.py", "test_attention_map_edges.py"], (95, 19)),
    "kd_loss": (["test_kd_loss.py", "test_kd_loss_edges.py", "test_large.py"], (95, 80)),
    "hardness": (["test_hardness.py", "test_select_hardest.py"], (110, 80)),
    "mix": (["test_mix.py"], (35, 30)),
    "grouped_pointwise": (["test_triton_grouped_pointwise.py"], (40, 15)),
}
PARTS = [False, pytest.param(True, marks=pytest.mark.matrix)]

triton = pytest.importorskip("triton")


def test_every_op_with_kernels_takes_part() -> None:
    assert {file.parent.name for file in KERNELS.glob("*/gpu_kernels.py")} == set(OPS)


def ops_of_session(request: pytest.FixtureRequest) -> list[str]:
    """The ops that this session tests with the fixture of the request."""
    tests = [t for t in request.session.items if request.fixturename in t.fixturenames]  # type: ignore[attr-defined]
    return list(dict.fromkeys(t.callspec.params["op"] for t in tests))  # type: ignore[attr-defined]


class Interpretation(NamedTuple):
    """What a process of the interpreter made of the tests of several ops."""

    in_matrix: bool
    output: str
    outcomes: Counter[tuple[str, str]]
    """By file and outcome: "passed", "skipped" or "failed"."""


@pytest.fixture(scope="module", params=PARTS, ids=["default", "matrix"])
def interpretation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Interpretation:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process is the interpreter")
    report = tmp_path_factory.mktemp("interpreter") / "report.xml"
    marks = f"{'matrix' if request.param else 'not matrix'} and not slow"
    files = [file for op in ops_of_session(request) for file in OPS[op][0]]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks]
    done = subprocess.run(
        [*command, f"--junitxml={report}", *files],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    output = done.stdout[-4000:] + done.stderr[-2000:]
    assert report.exists(), output
    return Interpretation(request.param, output, Counter(outcomes(report)))


def outcomes(report: Path) -> Iterator[tuple[str, str]]:
    """(file, outcome) of every test in a JUnit report."""
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        bad = tags & {"failure", "error"}
        file = case.get("classname", "").rpartition(".")[2] + ".py"
        yield file, "failed" if bad else "skipped" if "skipped" in tags else "passed"


@pytest.mark.parametrize("op", OPS)
def test_interpreted_kernels_pass_the_tests_of_the_op(op: str, interpretation) -> None:
    files, at_least = OPS[op]
    count = interpretation.outcomes
    assert sum(count[file, "failed"] for file in files) == 0, interpretation.output
    passed = sum(count[file, "passed"] for file in files)
    assert passed >= at_least[interpretation.in_matrix], interpretation.output


class Compilation(NamedTuple):
    """What triton_offline.py found."""

    max_spilled: int
    launches: dict[str, list[dict]]
    """By op: every launch on every chip, a part of them compiled."""

    def compiled(self, op: str) -> list[dict]:
        """The rows of an op that are compiled."""
        launches = [launch for launch in self.launches[op] if launch["compiled"] is not None]
        return [launch | launch["chosen"] | launch["compiled"] for launch in launches]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("turns", marks=pytest.mark.matrix),
        pytest.param("all", marks=pytest.mark.slow),
    ],
)
def compilation(request: pytest.FixtureRequest) -> Compilation:
    part = request.param
    done = subprocess.run(
        [sys.executable, HERE / "triton_offline.py", part, *ops_of_session(request)],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Compilation(**json.loads(done.stdout))


@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_and_can_be_launched(op: str, compilation: Compilation) -> None:
    """What is ours is asserted, what a compiler makes of it is reported: registers and spills.

    In the matrix every launch for one of the chips, with `-m slow` for all.
    """
    chips = {launch["chosen"]["chip"] for launch in compilation.launches[op]}
    assert chips == {"sm_80", "sm_90", "sm_100"}
    kernels = {launch["chosen"]["kernel"] for launch in compilation.launches[op]}
    rows = compilation.compiled(op)
    assert {row["kernel"] for row in rows} == kernels
    for row in rows:
        # 64 k registers per multiprocessor: at least one block of every kernel fits.
        assert row["registers"] * row["warps"] * 32 <= 65536, row
        assert row["shared"] <= 48 * 1024, row
        assert row["spilled"] <= compilation.max_spilled, row
        if row["spilled"] > 0:
            spills = f"Triton {triton.__version__} spills {row['spilled']} bytes per thread"
            message = f"{spills}: {op} {row['kernel']}, {row['case']}, on {row['chip']}"
            warnings.warn(pytest.PytestWarning(message), stacklevel=1)


@pytest.mark.parametrize("op", OPS)
def test_memory_is_read_in_128_bit_loads_where_rows_are_aligned(op: str, compilation) -> None:
    for row in compilation.compiled(op):
        if row["wide_loads"]:
            assert row["load bits"] >= 128, row


@pytest.mark.parametrize("op", OPS)
def test_every_launch_says_what_it_has_to_do(op: str, compilation: Compilation) -> None:
    for launch in compilation.launches[op]:
        assert launch["bytes"] > 0, launch
        assert launch["operations"] > 0, launch


@pytest.mark.parametrize("op", OPS)
def test_the_page_lists_every_launch_and_what_its_compiler_gave(op: str, compilation) -> None:
    """docs/kernels.md, section by section; `triton_offline.py --write` makes it.

    Its launches under any version of Triton, the compiler's columns under the version it names.
    """
    text = PAGE.read_text()
    version = re.search(r"Triton (\d+\.\d+\.\d+)", text)
    assert version is not None
    section = text.partition(f"## {op}\n")[2].partition("\n## ")[0].splitlines()
    lines = [line for line in section if line.startswith("| ") and "---" not in line]
    launches = compilation.launches[op]
    works = list(dict.fromkeys(launch["work"] for launch in launches))
    assert lines[1 : 1 + len(works)] == works
    names, *cells = ([x.strip() for x in line.split("|")[1:-1]] for line in lines[len(works) + 1 :])
    assert len(cells) == len(launches)
    for row, launch in zip(cells, launches, strict=True):
        expected = launch["chosen"]
        if triton.__version__ == version[1]:
            expected = expected | (launch["compiled"] or {})
        listed = dict(zip(names, row, strict=True))
        assert {name: listed[name] for name in expected} == {
            name: str(value) for name, value in expected.items()
        }
