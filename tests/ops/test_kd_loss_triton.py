"""The Triton kernels of `kd_loss` without a GPU: interpreted on the whole matrix, compiled offline.

Interpreter and compiler need processes of their own: the switch is read when Triton is imported.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
README = Path(__file__).parents[2] / "kernels" / "kd_loss" / "README.md"

pytest.importorskip("triton")


def test_few_long_rows_are_split_and_everything_else_is_not() -> None:
    from fastkd.kernels.kd_loss.gpu import plan

    assert plan(1, 33000, 1).splits > 1  # the shape of test_few_long_rows
    assert plan(16, 1_000_000, 1).splits == 64
    assert plan(1024, 21841, 1).splits == plan(64, 100, 1).splits == 1
    assert plan(524288, 19, 131072).splits == 1


def test_interpreted_kernels_pass_the_tests_of_kd_loss() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process is the interpreter")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            HERE / "test_kd_loss.py",
            HERE / "test_kd_loss_edges.py",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 120


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, HERE / "triton_offline.py"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_kernels_compile_for_three_chips_without_spills(compiled: list[dict]) -> None:
    assert {row["chip"] for row in compiled} == {"sm_80", "sm_90", "sm_100"}
    for row in compiled:
        assert row["spills"] == 0, row
        # 64 k registers a chip core: at least one block of every kernel fits four times over.
        assert row["registers"] * row["warps"] * 32 <= 65536, row
        assert row["shared"] <= 48 * 1024, row


def test_logits_are_read_in_128_bit_loads_where_rows_are_aligned(compiled: list[dict]) -> None:
    for row in compiled:
        if "21841" in row["case"]:
            continue  # an odd class count leaves rows at odd addresses
        assert row["widest_load"] == 128, row


def test_readme_lists_what_the_compiler_gives(compiled: list[dict]) -> None:
    """Registers and loads as documented; triton_offline.py --markdown makes the table."""
    import triton

    text = README.read_text()
    version = re.search(r"Triton (\d+\.\d+)", text)
    assert version is not None
    if not triton.__version__.startswith(version[1]):
        pytest.skip(f"the table was made with Triton {version[1]}, this is {triton.__version__}")
    for row in compiled:
        line = "| " + " | ".join(str(value) for value in row.values()) + " |"
        assert line in text, f"not in {README.name}: {line}"
