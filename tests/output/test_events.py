"""TensorBoard events are metrics.jsonl once more; without the package the request is refused."""

import importlib.util
import sys

import pytest

import fastkd.data.sources.synthetic
from fastkd.errors import UserError
from fastkd.output.events import check_tensorboard
from fastkd.output.run_folder import RunFolder

KEYS = [
    "data.name=synthetic",
    "data.train_limit=64",
    "student.name=resnet8",
    "student.width=0.5",
    "batch_size=32",
    "precision=fp32",
    "compile=off",
    "device=cpu",
    "tensorboard=true",
    "teacher=null",
    "losses.kd=null",
    "losses.ce.weight=1",
]

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def test_without_the_package_the_key_is_refused_before_anything_is_built(
    command, tmp_path, monkeypatch
):
    # None in sys.modules is how Python notes that a module is not available.
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    said = command("train", *KEYS)
    assert (said.code, said.out) == (2, "")
    assert said.err == (
        "fastkd: tensorboard=true needs the package tensorboard, which is not installed: "
        "pip install tensorboard, or remove the key\n"
    )
    assert not any(tmp_path.iterdir())


def test_the_check_passes_where_the_package_is(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_tensorboard()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed"):
        check_tensorboard()


@needs_tensorboard
def test_every_stage_writes_its_epochs(command, tmp_path, monkeypatch):
    monkeypatch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 50)
    said = command("train", *KEYS, "epochs=2", "baseline.lrs=0.1", "out=run")
    assert said.code == 0
    for folder in ("run", "run/alone/lr-0.1"):
        rows = RunFolder(tmp_path / folder).metrics()
        found = scalars(tmp_path / folder / "tensorboard")
        for name, key in (("val/accuracy", "val_accuracy"), ("train/loss", "train_loss")):
            assert found[name] == [(r["epoch"], pytest.approx(r[key], rel=1e-6)) for r in rows]
        assert {"lr", "images_per_s", "data_wait"} <= set(found)


@needs_tensorboard
def test_a_resumed_run_replaces_what_lies_past_its_checkpoint(tmp_path):
    row = {"epoch": 1, "train_loss": 3.0, "val_accuracy": 0.1}
    killed = RunFolder(tmp_path).with_events()
    killed.append_metrics(row)
    killed.append_metrics(row | {"epoch": 2, "train_loss": 99.0})
    resumed = RunFolder(tmp_path).with_events()
    resumed.append_metrics(row | {"epoch": 2, "train_loss": 2.0})
    resumed.finish({})
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [(1, 3.0), (2, 2.0)]


def test_without_the_key_nothing_is_written(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics({"epoch": 1, "train_loss": 3.0})
    folder.finish({})
    assert not (tmp_path / "tensorboard").exists()
