"""The Triton kernels without a GPU: interpreted on each op's test matrix, compiled offline.

Interpreter and compiler need processes of their own: the switch is read when Triton is imported.
An op takes part by its tests, its triton_cases_<op>.py and a line of OPS.
"""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
KERNELS = Path(__file__).parents[2] / "kernels"
# op: test files that the interpreter runs, and how many of their tests it must not skip
OPS = {
    "attention_map": (["test_attention_map.py", "test_attention_map_edges.py"], 110),
    "kd_loss": (["test_kd_loss.py", "test_kd_loss_edges.py", "test_large.py"], 120),
    "hardness": (["test_hardness.py", "test_select_hardest.py"], 200),
    "mix": (["test_mix.py"], 60),
}

triton = pytest.importorskip("triton")


def test_every_op_with_kernels_takes_part() -> None:
    assert {file.parent.name for file in KERNELS.glob("*/gpu_kernels.py")} == set(OPS)


def passed_interpreted(*words: str) -> int:
    """How many tests the interpreter passed; none fails."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process is the interpreter")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    return int(passed[1])


@pytest.mark.parametrize("op", OPS)
def test_interpreted_kernels_pass_the_tests_of_the_op(op: str) -> None:
    files, at_least = OPS[op]
    assert passed_interpreted(*files) >= at_least


@pytest.mark.matrix
def test_interpreted_kernels_pass_the_exhaustive_tests() -> None:
    files = [file for files, _ in OPS.values() for file in files]
    assert passed_interpreted("-m", "matrix", *files) >= 6


class Compiled(NamedTuple):
    """What triton_offline.py found for an op."""

    op: str
    launches: list[dict]
    ours: list[str]
    """The columns of a row that do not depend on the compiler."""
    max_spilled: int


# A reduction over rows and an elementwise op stand for the others.
REPRESENTATIVE = {"kd_loss", "mix"}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(op, marks=() if op in REPRESENTATIVE else pytest.mark.matrix) for op in OPS
    ],
)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, HERE / "triton_offline.py", request.param],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Compiled(request.param, **json.loads(done.stdout))


def test_kernels_compile_for_three_chips_and_can_be_launched(compiled: Compiled) -> None:
    """What is ours is asserted, what a compiler makes of it is reported: registers and spills."""
    rows = [launch["row"] for launch in compiled.launches]
    assert {row["chip"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    for row in rows:
        # 64 k registers per multiprocessor: at least one block of every kernel fits.
        assert row["registers"] * row["warps"] * 32 <= 65536, row
        assert row["shared"] <= 48 * 1024, row
        assert row["spilled"] <= compiled.max_spilled, row
        if row["spilled"] > 0:
            spills = f"Triton {triton.__version__} spills {row['spilled']} bytes per thread"
            message = f"{spills}: {row['kernel']}, {row['case']}, on {row['chip']}"
            warnings.warn(pytest.PytestWarning(message), stacklevel=1)


def test_memory_is_read_in_128_bit_loads_where_rows_are_aligned(compiled: Compiled) -> None:
    for launch in compiled.launches:
        if launch["wide_loads"]:
            assert launch["row"]["load bits"] >= 128, launch["row"]


def test_every_launch_says_what_it_has_to_do(compiled: Compiled) -> None:
    assert all(launch["bytes"] > 0 and launch["operations"] > 0 for launch in compiled.launches)


def test_the_page_lists_every_launch_and_what_its_compiler_gave(compiled: Compiled) -> None:
    """docs/kernels.md, section by section; `triton_offline.py --write` makes it.

    Its launches under any version of Triton, the compiler's columns under the one that it names.
    """
    text = (KERNELS.parent / "docs" / "kernels.md").read_text()
    version = re.search(r"Triton (\d+\.\d+\.\d+)", text)
    assert version is not None
    section = text.partition(f"## {compiled.op}\n")[2].partition("\n## ")[0].splitlines()
    lines = [line for line in section if line.startswith("| ") and "---" not in line]
    works = list(dict.fromkeys(launch["work"] for launch in compiled.launches))
    assert lines[1 : 1 + len(works)] == works
    names, *cells = ([x.strip() for x in line.split("|")[1:-1]] for line in lines[len(works) + 1 :])
    assert names == list(compiled.launches[0]["row"])
    columns = names if triton.__version__ == version[1] else compiled.ours
    listed = [dict(zip(names, row, strict=True)) for row in cells]
    assert [[row[name] for name in columns] for row in listed] == [
        [str(launch["row"][name]) for name in columns] for launch in compiled.launches
    ]
