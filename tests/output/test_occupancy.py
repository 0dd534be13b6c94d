"""One process at a time in a run folder: others wait for a shared teacher, or are told."""

import fcntl
import os
import threading
from pathlib import Path

import pytest
import torch

from fastkd.compute.ranks import World
from fastkd.errors import UserError
from fastkd.output.occupancy import occupied
from fastkd.output.run_folder import RunFolder

WORLD = World(0, 0, 1, torch.device("cpu"), None)


def lock(path: Path) -> int:
    """What another process would hold; closing the descriptor lets go."""
    path.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


def test_a_run_folder_in_use_is_refused(tmp_path: Path) -> None:
    other = lock(tmp_path / "run")
    with (
        pytest.raises(UserError, match=r"another process is using .*run"),
        occupied(tmp_path / "run", WORLD),
    ):
        pytest.fail("entered a folder that is in use")
    os.close(other)
    for _ in range(2):  # it is let go at the end
        with occupied(tmp_path / "run", WORLD):
            assert (tmp_path / "run").is_dir()


def test_the_lock_of_another_host_is_on_a_file(tmp_path: Path) -> None:
    """A network file system tells other hosts nothing of locks on folders."""
    with occupied(tmp_path / "run", WORLD):
        handle = os.open(tmp_path / "run/.lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
    assert not any((tmp_path / "run").iterdir())
    with (tmp_path / "run/.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with (
            pytest.raises(UserError, match=r"another process is using .*run"),
            occupied(tmp_path / "run", WORLD),
        ):
            pytest.fail("entered a folder that is in use")
    with occupied(tmp_path / "run", WORLD):  # what a killed process leaves behind is no obstacle
        assert RunFolder.open(tmp_path / "run").summary() is None


def test_a_shared_stage_is_waited_for(tmp_path: Path) -> None:
    other, notes = lock(tmp_path / "teacher"), []

    def waiting() -> None:
        notes.append("waiting")
        threading.Timer(0.05, os.close, (other,)).start()

    with occupied(tmp_path / "teacher", WORLD, waiting, ask_again_s=0.01):
        assert notes == ["waiting"]


def test_a_folder_that_its_holder_took_away_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "teacher"
    path.mkdir()
    original = fcntl.flock

    def taken_away(handle: int, operation: int) -> None:
        original(handle, operation)
        monkeypatch.setattr(fcntl, "flock", original)
        path.rmdir()

    monkeypatch.setattr(fcntl, "flock", taken_away)
    with occupied(path, WORLD, lambda: None, ask_again_s=0.01):
        assert path.is_dir()
        with pytest.raises(BlockingIOError):
            fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
