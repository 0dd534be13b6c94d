"""Runs with trackers: grouped by stage, continued after a kill and a stop, sent by rank 0 alone."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tracked_stores as stores

import fastkd.data.sources.synthetic
from fastkd.errors import RunFailed
from fastkd.output.run_folder import RunFolder
from fastkd.output.trackers.tensorboard import TensorBoardSink
from fastkd.training.update import Update

KEYS = [
    "data.name=synthetic",
    "data.train_limit=64",
    "student.name=resnet8",
    "student.width=0.5",
    "batch_size=32",
    "precision=fp32",
    "compile=off",
    "device=cpu",
    "teacher=null",
    "losses.kd=null",
    "losses.ce.weight=1",
    "baseline.lrs=",
    "out=run",
]

needs_tensorboard = pytest.mark.skipif(
    not stores.installed("tensorboard"), reason="tensorboard is not installed"
)


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 49)


@needs_tensorboard
def test_every_stage_is_shown_and_all_are_one_group(
    command: Any, tmp_path: Path, mlflow_uri: str
) -> None:
    said = command(
        "train", *KEYS, "epochs=2", "baseline.lrs=0.1", "track=mlflow", "tensorboard=true"
    )
    assert said.code == 0, said.err
    runs = stores.mlflow_runs(mlflow_uri)
    assert {run.data.tags["fastkd.group"] for run in runs.values()} == {"quickstart run"}
    for folder, name, stage in (
        ("run", "quickstart run", "student"),
        ("run/alone/lr-0.1", "quickstart/alone-lr0.1 lr-0.1", "alone"),
    ):
        rows = RunFolder(tmp_path / folder).metrics()
        assert [one["epoch"] for one in rows] == [1, 2]
        run = runs.pop(name)
        assert (run.info.status, run.data.tags["fastkd.stage"]) == ("FINISHED", stage)
        assert run.data.params["optim.lr"] == ("0.1" if stage == "alone" else "0.4")
        events = stores.tensorboard_scalars(tmp_path / folder / "tensorboard")
        for shown, key in (("val/accuracy", "val_accuracy"), ("train/loss", "train_loss")):
            points = [(one["epoch"], one[key]) for one in rows]
            assert stores.mlflow_points(mlflow_uri, run.info.run_id, shown) == points
            assert events[shown] == [(e, pytest.approx(value, rel=1e-6)) for e, value in points]
        assert f"mlflow: run {run.info.run_id} of sqlite:///" in said.out
        summary = json.loads((tmp_path / folder / "summary.json").read_text())
        assert run.data.metrics["final/accuracy_best"] == summary["accuracy_best"]
    assert not runs
    kept = {path.name for path in (tmp_path / "mlruns").rglob("*") if path.is_file()}
    assert kept == {"curves.png", "table.md"}
    (table,) = (tmp_path / "mlruns").rglob("table.md")
    assert table.read_text().count("\n| student") == 2


@needs_tensorboard
def test_a_killed_run_continues_in_every_tracker(
    command: Any,
    program: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mlflow_uri: str,
    trackio_folder: Path,
    offline: None,
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(trackio_folder))
    # As from a shell: a run that is killed leaves its process of W&B, too.
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    program("tracked_runs.py", tmp_path / "work", code=-signal.SIGKILL)
    run = tmp_path / "work/run"
    before = json.loads((run / "trackers.json").read_text())
    assert {name: one["rows"] for name, one in before.items()} == dict.fromkeys(before, 2)
    said = command("train", "--resume", str(run))
    assert said.code == 0, said.err
    assert "resumed tiny/kd at epoch 2 of 3" in said.out
    after = json.loads((run / "trackers.json").read_text())
    assert {name: one["rows"] for name, one in after.items()} == dict.fromkeys(before, 3)
    assert all(after[name]["id"] == before[name]["id"] for name in before)
    rows = RunFolder(run).metrics()
    losses = [(one["epoch"], one["train_loss"]) for one in rows]
    assert [epoch for epoch, _ in losses] == [1, 2, 3]
    # The killed process logged epoch 2 before it was saved, and may have had other threads.
    close = [(epoch, pytest.approx(value, rel=1e-6)) for epoch, value in losses]

    events = stores.tensorboard_scalars(run / "tensorboard")
    assert events["train/loss"] == close
    parts = stores.wandb_parts(run / "wandb", 2, killed=True)
    assert stores.wandb_ids(parts) == {after["wandb"]["id"]}
    first, second = ([(r["epoch"], r["train/loss"]) for r in stores.wandb_rows(p)] for p in parts)
    # What W&B had not written yet when it was killed is in the second part.
    assert first + second == close
    id = after["mlflow"]["id"]
    assert stores.mlflow_points(mlflow_uri, id, "train/loss") == close
    assert stores.mlflow_runs(mlflow_uri)["tiny/kd run"].info.status == "FINISHED"
    shown = stores.trackio_rows(trackio_folder)[after["trackio"]["id"]]
    assert [(one["epoch"], one["train/loss"]) for one in shown] == close


def test_a_stopped_run_says_so_and_runs_again(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_uri: str
) -> None:
    append = RunFolder.append_metrics

    def stopping(folder: RunFolder, row: Any) -> None:
        append(folder, row)
        if row["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", stopping)
        said = command("train", *KEYS, "epochs=3", "track=mlflow")
    assert said.code == 130
    (run,) = stores.mlflow_runs(mlflow_uri).values()
    assert run.info.status == "KILLED"
    assert command("train", "--resume", "run").code == 0
    (again,) = stores.mlflow_runs(mlflow_uri).values()
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    points = stores.mlflow_points(mlflow_uri, run.info.run_id, "val/accuracy")
    rows = RunFolder(tmp_path / "run").metrics()
    assert points == [(one["epoch"], one["val_accuracy"]) for one in rows]
    assert len(points) == 3


@needs_tensorboard
def test_a_tracker_that_fails_does_not_stop_the_training(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = TensorBoardSink.row

    def failing(sink: TensorBoardSink, row: Any) -> None:
        if row["epoch"] == 2:
            raise OSError("the disk is on fire")
        take(sink, row)

    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardSink, "row", failing)
        said = command("train", *KEYS, "epochs=3", "track=tensorboard")
    assert said.code == 0
    assert said.err == (
        "fastkd: note: tensorboard gets nothing more of this run, which goes on: OSError: the disk "
        "is on fire. Every row is in run/metrics.jsonl\n"
    )
    assert len(RunFolder(tmp_path / "run").metrics()) == 3
    found = stores.tensorboard_scalars(tmp_path / "run/tensorboard")
    assert [epoch for epoch, _ in found["train/loss"]] == [1]


def test_a_run_that_fails_at_once_leaves_no_folder(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_uri: str
) -> None:
    def failing(*_: Any) -> None:
        raise RunFailed("the machine is tired")

    monkeypatch.setattr(Update, "__call__", failing)
    said = command("train", *KEYS, "epochs=1", "track=mlflow")
    assert said.code == 1
    (run,) = stores.mlflow_runs(mlflow_uri).values()
    assert run.info.status == "FAILED"
    assert not (tmp_path / "run").exists()


@needs_tensorboard
@pytest.mark.matrix
def test_rank_0_alone_sends(ranks: Any, tmp_path: Path) -> None:
    ranks(2, "tracked_ranks.py", tmp_path)
    (file,) = (tmp_path / "run/tensorboard").iterdir()
    rows = RunFolder(tmp_path / "run").metrics()
    found = stores.tensorboard_scalars(file.parent)["train/loss"]
    assert found == [(r["epoch"], pytest.approx(r["train_loss"], rel=1e-6)) for r in rows]
    assert len(found) == 2
