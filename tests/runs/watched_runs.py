"""Runs of a sweep that a test watches: others execute them, on Ray's nodes or in SLURM's jobs."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from fastkd.storage.weights import load_weights
from fastkd.testing.recipes import TINY

__all__ = ["ALONE", "assert_same_weights", "checkpoints", "logs", "until"]

ALONE = [*TINY, "teacher=null", "losses.kd=null", "losses.ce.weight=1", "baseline.lrs="]

T = TypeVar("T")


def until(what: Callable[[], T], seconds: float = 240) -> T:
    """Wait for something to be true."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def checkpoints(folder: Path) -> list[Path]:
    """Of all runs that a test has started there."""
    return list(folder.glob("runs/quickstart/*/last.pt"))


def logs(folder: Path) -> list[str]:
    """What the runs of a sweep have said."""
    return [file.read_text() for file in sorted(folder.glob("runs/quickstart/sweep-*.log"))]


def assert_same_weights(folder: Path, plain: Path) -> None:
    """Of the run with seed 0 below a folder, and of a run that nobody has stopped."""
    (run,) = (
        file.parent
        for file in folder.glob("runs/quickstart/*/config.yaml")
        if "\nseed: 0\n" in file.read_text()
    )
    one, two = (load_weights(place)[0] for place in (run, plain))
    assert one and all(torch.equal(one[key], two[key]) for key in one)
