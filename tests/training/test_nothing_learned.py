"""A run in which no step was good has failed, however few its steps, and says what to do."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastkd
from fastkd.errors import RunFailed
from fastkd.losses import CrossEntropy

QUIET: dict[str, Any] = {"device": "cpu", "compile": "off", "precision": "fp32", "quiet": True}
MESSAGE = r"nothing was learned: every step \(4\) had a loss or a gradient that was not finite"


class Batches(list[tuple[Tensor, Tensor]]):
    """Two batches an epoch; in the epochs of `bad` they hold NaN."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__((torch.randn(8, 3, 8, 8), torch.arange(8) % 4) for _ in range(2))
        self.bad, self.now = bad, 0

    def set_epoch(self, epoch: int) -> None:
        self.now = epoch

    def __iter__(self) -> Any:
        for images, labels in super().__iter__():
            yield (images * math.nan if self.now in self.bad else images), labels


def train(bad: set[int], **options: Any) -> Any:
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    losses = [CrossEntropy()]
    given = {"epochs": 2, "losses": losses} | QUIET | options
    return fastkd.distill(student, None, Batches(bad), Batches(set()), **given)


def test_a_run_without_a_good_step_has_failed(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=MESSAGE) as failed:
        train({0, 1}, out=tmp_path / "run")
    assert failed.value.exit_code == 1
    assert not (tmp_path / "run" / "summary.json").exists()
    # With good images it continues where it stood.
    resumed = train(set(), out=tmp_path / "run", resume=True)
    assert resumed.metrics["skipped_steps"] == 2


def test_an_epoch_without_a_good_step_has_no_loss(tmp_path: Path) -> None:
    found = train({0}, out=tmp_path)
    first, second = found.metrics["history"]
    assert math.isnan(first["train_loss"]) and math.isnan(first["train_ce"])
    assert math.isnan(first["train_accuracy"])
    assert second["train_loss"] > 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["train_loss"] is None for row in rows] == [True, False]


def test_the_command_ends_with_code_1(command: Callable[..., Any], tmp_path: Path) -> None:
    words = [
        "device=cpu",
        "compile=off",
        "epochs=1",
        "data.train_limit=64",
        "teacher=null",
        "optim.lr=1e38",
        "losses.kd=null",
        "losses.ce.weight=1e38",
        "baseline.lrs=",
        "out=run",
    ]
    said = command("train", "quickstart", *words)
    assert said.code == 1
    assert "nothing was learned: every step (1) had" in said.err
    assert not (tmp_path / "run").exists()


def test_a_weight_of_infinity_is_no_weight(command: Callable[..., Any], tmp_path: Path) -> None:
    for word, key in (("inf", "inf"), (".inf", ".inf"), (".nan", ".nan")):
        said = command("train", "quickstart", f"losses.kd.weight={word}", "out=run")
        assert said.code == 2
        assert f"losses.kd.weight={key}: expected a finite number above 0" in said.err
    assert not (tmp_path / "run").exists()
