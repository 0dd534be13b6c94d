"""The Triton kernels without a GPU: interpreted on each op's test matrix, compiled offline.

Interpreter and compiler need processes of their own: the switch is read when Triton is imported.
An op takes part by its tests, its triton_cases_<op>.py and a line of OPS.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("op", OPS)
def test_interpreted_kernels_pass_the_tests_of_the_op(op: str) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process is the interpreter")
    files, at_least = OPS[op]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= at_least


@pytest.fixture(scope="module", params=OPS)
def compiled(request: pytest.FixtureRequest) -> tuple[str, list[dict]]:
    """The op's name and what triton_offline.py found."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, HERE / "triton_offline.py", request.param],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, json.loads(done.stdout)


def test_kernels_compile_for_three_chips_without_spills(compiled) -> None:
    rows = [found["row"] for found in compiled[1]]
    assert {row["chip"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    # Triton 3.6 puts one register of one kernel aside on sm_100.
    spare = {"sm_100": 4} if triton.__version__.startswith("3.6.") else {}
    for row in rows:
        assert row["spills"] <= spare.get(row["chip"], 0), row
        # 64 k registers a chip core: at least one block of every kernel fits.
        assert row["registers"] * row["warps"] * 32 <= 65536, row
        assert row["shared"] <= 48 * 1024, row


def test_memory_is_read_in_128_bit_loads_where_rows_are_aligned(compiled) -> None:
    for found in compiled[1]:
        if found["wide_loads"]:
            assert found["row"]["load bits"] >= 128, found["row"]


def test_every_launch_says_what_it_has_to_do(compiled) -> None:
    assert all(found["bytes"] > 0 and found["operations"] > 0 for found in compiled[1])


def test_the_page_lists_what_the_compiler_gives(compiled) -> None:
    """docs/kernels.md, section by section; `triton_offline.py --write` makes it."""
    import triton

    text = (KERNELS.parent / "docs" / "kernels.md").read_text()
    version = re.search(r"Triton (\d+\.\d+)", text)
    assert version is not None
    section = text.partition(f"## {compiled[0]}\n")[2].partition("\n## ")[0].splitlines()
    works = list(dict.fromkeys(found["work"] for found in compiled[1]))
    lines = [line for line in section if line.startswith("| ") and "---" not in line]
    assert lines[1 : 1 + len(works)] == works
    if not triton.__version__.startswith(version[1]):
        pytest.skip(f"the table was made with Triton {version[1]}, this is {triton.__version__}")
    rows = ["| " + " | ".join(map(str, found["row"].values())) + " |" for found in compiled[1]]
    assert lines[2 + len(works) :] == rows
