"""benchmarks/gpu.py without a GPU: its cheapest part from end to end, and what a cut run leaves."""

import importlib.util
import json
import subprocess
import sys
import time
import zipfile
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")
PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
OPS = {"kd_loss", "hardness", "attention", "mix", "block", "block inference"}


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_program", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_how_to_go_on(tmp_path: Path) -> None:
    words = [sys.executable, PROGRAM, "--child", "2", "--seconds", "60", "--out", tmp_path]
    done = subprocess.run(
        words, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    )
    assert done.returncode == 2
    assert "use --rehearse" in done.stdout


@pytest.mark.matrix
def test_the_ops_are_rehearsed_on_interpreted_kernels(tmp_path: Path) -> None:
    words = [sys.executable, PROGRAM, "--rehearse", "--part", "2", "--out", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = (tmp_path / "gpu_ops_rehearsal.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert found[0]["kind"] == "environment"
    assert found[-1]["kind"] == "done"
    assert {line["table"] for line in found if line["kind"] == "row"} == OPS
    assert not [line for line in found if line["kind"] == "failed"]
    page = (tmp_path / "gpu_ops_rehearsal.md").read_text()
    assert page.startswith("# gpu.py, part ops: complete")
    assert "== short of a bar, failed or not run:" in done.stdout


def test_a_part_is_ended_with_its_children_when_its_time_is_up(gpu, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    late = f"import time, pathlib; time.sleep(2); pathlib.Path({str(mark)!r}).touch()"
    both = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {late!r}])"
    assert gpu.limited([sys.executable, "-c", both], {}, 0.5) == 124
    time.sleep(2.5)
    assert not mark.exists()


@pytest.mark.slow
def test_every_training_trains_its_teacher(tmp_path: Path) -> None:
    """One that an earlier run had trained would be missing in the rate of an epoch."""
    words = [sys.executable, PROGRAM, "--rehearse", "--part", "4", "--out", tmp_path / "out"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = (tmp_path / "out" / "gpu_training_rehearsal.jsonl").read_text().splitlines()
    runs = [found["run"] for found in map(json.loads, lines) if found["kind"] == "row"]
    teacher, student = runs
    assert teacher.startswith("teacher/")
    assert student == "cifar10/resnet56--resnet20/kd"
    assert not (tmp_path / "runs").exists()


def test_what_was_found_wanting_is_listed_over_all_parts_failures_first(
    gpu, tmp_path: Path
) -> None:
    assert gpu.shortfalls(tmp_path).endswith("  nothing")
    found = {"ops": [("row", "a"), ("short", "b; found 0.5")], "proof": [("failed", "c")]}
    for part, findings in found.items():
        lines = [json.dumps({"kind": kind, "text": text}) + "\n" for kind, text in findings]
        (tmp_path / f"gpu_{part}_x.jsonl").write_text("".join(lines))
    assert gpu.shortfalls(tmp_path).splitlines()[1:] == [
        "  gpu_proof_x: failed: c",
        "  gpu_ops_x: short: b; found 0.5",
    ]


def test_only_missing_packages_are_taken_from_the_wheels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(PROGRAM.parent)
    assets = import_module("gpu_parts.assets")
    monkeypatch.setattr(assets, "UNPACKED", tmp_path / "unpacked")
    assert assets.unpacked_wheels(tmp_path) == []
    for name in ("pytest", "not_there_at_all"):
        with zipfile.ZipFile(tmp_path / f"{name}-99.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
    (site,) = assets.unpacked_wheels(tmp_path)
    assert [path.name for path in Path(site).iterdir()] == ["not_there_at_all"]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(PROGRAM.parent)
    wanted = '["pytest>=8", "not-there_at.all>=2"]'
    (tmp_path / "pyproject.toml").write_text(f"[project]\ndependencies = {wanted}\n")
    assert import_module("gpu_parts.assets").lacking(tmp_path) == ["not-there_at.all"]
