"""`fastkd.distill(track=..)`: shown once, continued by a resumed call, refused without a folder."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd.errors import UserError
from fastkd.losses import CrossEntropy
from fastkd.output.run_folder import RunFolder

DATA = TensorDataset(torch.randn(16, 3, 4, 4), torch.arange(16) % 2)
LOADER = DataLoader(DATA, batch_size=4)


def distill(**more: Any) -> Any:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    losses = [CrossEntropy()]
    how = {"epochs": 3, "losses": losses, "device": "cpu", "quiet": True} | more
    return fastkd.distill(student, None, LOADER, LOADER, **how)


def losses_shown(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload().Scalars("train/loss")
    return [(one.step, one.value) for one in found]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
def test_a_resumed_call_continues_the_same_run(tmp_path: Path) -> None:
    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise LookupError("enough")

    out = tmp_path / "run"
    with pytest.raises(LookupError):
        distill(out=out, track="tensorboard", on_epoch=stop)
    assert [epoch for epoch, _ in losses_shown(out / "tensorboard")] == [1, 2]
    distill(out=out, track=["tensorboard"], resume=True)
    rows = [(one["epoch"], one["train_loss"]) for one in RunFolder(out).metrics()]
    assert [epoch for epoch, _ in rows] == [1, 2, 3]
    shown = losses_shown(out / "tensorboard")
    assert shown == [(epoch, pytest.approx(loss, rel=1e-6)) for epoch, loss in rows]
    assert json.loads((out / "trackers.json").read_text())["tensorboard"]["rows"] == 3
    # A finished run gives its result, and is not shown again.
    before = {path: path.stat().st_mtime_ns for path in (out / "tensorboard").iterdir()}
    distill(out=out, track="tensorboard", resume=True)
    assert {p: p.stat().st_mtime_ns for p in (out / "tensorboard").iterdir()} == before


def test_a_wrong_request_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="track='wandb' needs out=, the folder that remembers"):
        distill(track="wandb")
    with pytest.raises(UserError, match="track='neptune': expected some of tensorboard, wandb"):
        distill(track="neptune", out=tmp_path / "run")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r'not installed: pip install "fastkd\[wandb\]"'):
        distill(track=("wandb",), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
