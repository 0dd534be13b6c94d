"""benchmarks/conftest.py on a benchmark of its own: what pytest-benchmark and results/ get."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[2] / "benchmarks" / "conftest.py"
BENCHMARK = """
import time

CALLS = []

def side(name, seconds):
    def run():
        CALLS.append(name)
        time.sleep(seconds)
    return run

def bench_sleep(table, race):
    found = race({"slow": side("slow", 0.004), "fastkd": side("fastkd", 0.001)})
    table.rows.append({"case": "sleep", **found.cells()})
    assert CALLS[:4] == ["slow", "fastkd", "fastkd", "slow"]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "bench_nap.py").write_text(BENCHMARK)
    options = "[pytest]\npython_files = bench_*.py\npython_functions = bench_*\n"
    (tmp_path / "pytest.ini").write_text(options)
    return tmp_path


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    # In a worker of xdist pytest-benchmark reads no clock.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def test_every_side_has_an_entry_with_all_its_samples(folder: Path) -> None:
    done = run(folder, "--save-results", "--benchmark-json", "all.json")
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads((folder / "all.json").read_text())["benchmarks"]
    assert [entry["name"] for entry in entries] == ["bench_sleep slow", "bench_sleep fastkd"]
    slow, fast = entries
    assert slow["group"] == fast["group"] == "bench_sleep"
    assert len(slow["stats"]["data"]) == len(fast["stats"]["data"]) == 20
    assert min(slow["stats"]["data"]) >= 0.004
    assert set(slow["extra_info"]["time / fastkd"]) == {"median", "p10", "p90"}
    assert fast["extra_info"]["time / fastkd"]["median"] == 1

    (saved,) = (folder / "results").glob("nap_*.json")
    found = json.loads(saved.read_text())
    samples = {"slow": slow["stats"]["data"], "fastkd": fast["stats"]["data"]}
    assert found["seconds"] == {"bench_sleep": samples}
    (row,) = found["rows"]
    assert list(row) == ["case", "slow ms", "fastkd ms", "vs slow", "p10 vs slow"]
    assert "| case | slow ms | fastkd ms |" in saved.with_suffix(".md").read_text()
    assert "| case | slow ms | fastkd ms |" in done.stdout


@pytest.mark.matrix
def test_few_pairs_are_a_rehearsal_and_not_saved(folder: Path) -> None:
    done = run(folder, "--pairs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "A rehearsal with --pairs 2" in done.stdout
    refused = run(folder, "--pairs", "2", "--save-results")
    assert refused.returncode == 4
    assert "--save-results needs --pairs 20 or more, got 2" in refused.stderr
    assert not (folder / "results").exists()


def test_a_part_is_saved_under_its_own_name(folder: Path) -> None:
    other = BENCHMARK.replace("bench_sleep", "bench_doze")
    (folder / "bench_nap.py").write_text(BENCHMARK + other)
    done = run(folder, "--part", "doze", "--save-results")
    assert done.returncode == 0, done.stdout + done.stderr
    (saved,) = (folder / "results").glob("*.json")
    assert saved.name.startswith("nap_doze_")
    assert set(json.loads(saved.read_text())["seconds"]) == {"bench_doze"}
    refused = run(folder, "--part", "snore")
    assert refused.returncode == 4
    assert "there is no part snore; choose of doze, sleep" in refused.stderr


@pytest.mark.matrix
def test_quick_is_a_rehearsal(folder: Path) -> None:
    done = run(folder, "--quick", "--benchmark-json", "all.json")
    assert "A rehearsal with --quick" in done.stdout
    entries = json.loads((folder / "all.json").read_text())["benchmarks"]
    assert {len(entry["stats"]["data"]) for entry in entries} == {2}
    assert run(folder, "--quick", "--save-results").returncode == 4


def test_rows_with_other_columns_are_another_table(folder: Path) -> None:
    more = "    table.rows.append({'memory': 3})\n"
    (folder / "bench_nap.py").write_text(BENCHMARK + more)
    done = run(folder, "--quick")
    assert "\n\n| memory |\n| --- |\n| 3 |\n" in done.stdout


def test_without_a_clock_only_the_checks_run(folder: Path) -> None:
    done = run(folder, "--benchmark-disable", "-rs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the sides agree; --benchmark-disable reads no clock" in done.stdout
