"""A machine that does not give a loader's workers what they need says so in one sentence."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fastkd.data.loaders import workers
from fastkd.data.loaders.workers import from_workers
from fastkd.errors import UserError


class Pictures(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.full((3, 64, 64), float(index))


class Killed(Pictures):
    """As by the system when memory runs out."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


class BusError(Pictures):
    """As by the system when shared memory runs out."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGBUS)


class Fails(Pictures):
    def __init__(self, error):
        self.error = error

    def __getitem__(self, index):
        raise self.error


def drawn(dataset, num=1):
    return list(from_workers(DataLoader(dataset, batch_size=2, num_workers=num), "data.workers"))


@pytest.mark.parametrize("num", [0, 1])
def test_what_works_is_passed_on(num):
    first, second = drawn(Pictures(), num)
    assert first[:, 0, 0, 0].tolist() == [0, 1]
    assert second[:, 0, 0, 0].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        (Killed(), "the system has killed it, as it does when memory runs out"),
        (BusError(), "shared memory|the system has killed it"),
        (Fails(OSError(24, "Too many open files", "a.png")), "ulimit -n"),
        (Fails(OSError(12, "Cannot allocate memory")), "lower data.workers"),
        (
            Fails(RuntimeError("unable to write to file </torch_12_3_0>: No space left on device")),
            r"/dev/shm has .* MiB\): start the container with --shm-size=8g or --ipc=host, or set "
            "data.workers=0",
        ),
        (Fails(RuntimeError("unable to mmap 4096 bytes from file")), "--shm-size=8g"),
        (Fails(RuntimeError("received 0 items of ancdata")), "ulimit -n"),
    ],
    ids=["killed", "bus-error", "files", "memory", "shm-full", "mmap", "ancdata"],
)
def test_the_end_of_a_worker_is_one_sentence(dataset, says):
    with pytest.raises(UserError, match=says) as caught:
        drawn(dataset)
    assert "data.workers=0" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not caught.value.shared


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device", "copy.png"), RuntimeError("mine"), KeyError("label")],
    ids=["full-disk", "runtime", "key"],
)
def test_errors_of_a_data_set_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught:
        drawn(Fails(error))
    assert not isinstance(caught.value, UserError)
    assert str(error.args[-1]) in str(caught.value) or isinstance(error, OSError)


def test_workers_that_cannot_be_started(monkeypatch):
    def start(self):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(torch.multiprocessing.Process, "start", start)
    with pytest.raises(UserError, match="no room for another process"):
        drawn(Pictures())


def test_a_machine_without_shared_memory_is_told_so(monkeypatch):
    def statvfs(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(workers.os, "statvfs", statvfs)
    with pytest.raises(UserError, match="there is no /dev/shm"):
        drawn(Fails(RuntimeError("unable to resize file </torch_1> to the right size")))


def can_mount():
    if shutil.which("unshare") is None:
        return False
    words = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(words, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount")
@pytest.mark.parametrize("size", ["64k", "256k"])
def test_a_small_shared_memory_ends_a_real_loader_so(size, tmp_path):
    program = (
        "import torch\nfrom torch.utils.data import DataLoader, TensorDataset\n"
        "from fastkd.data.loaders.workers import from_workers\n"
        "data = TensorDataset(torch.zeros(8, 3, 128, 128))\n"
        "list(from_workers(DataLoader(data, batch_size=4, num_workers=1), 'data.workers'))\n"
    )
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {sys.executable} -c "$0"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, program], capture_output=True, text=True, timeout=120
    )
    assert "fastkd.errors.UserError: a worker of the data loader ended" in done.stderr
    assert "--shm-size=8g or --ipc=host" in done.stderr
