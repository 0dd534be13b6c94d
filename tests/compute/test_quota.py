"""A container's CPU limit bounds the threads of a training."""

import pytest
import torch

from fastkd.compute.machine import cpu_quota, keep_to_quota

FILES = {
    "2 cores": ({"cpu.max": "200000 100000\n"}, 2),
    "a core and a half": ({"cpu.max": "150000 100000"}, 2),
    "a tenth": ({"cpu.max": "10000 100000"}, 1),
    "cgroup v1": (
        {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        3,
    ),
    "no limit": ({"cpu.max": "max 100000\n"}, None),
    "no limit, v1": ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    "nothing": ({}, None),
    "nonsense": ({"cpu.max": "1 2 3"}, None),
}


def written(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("kind", FILES)
def test_the_limit_is_read(tmp_path, kind):
    files, cores = FILES[kind]
    assert cpu_quota(written(tmp_path, files)) == cores


@pytest.fixture
def threads(monkeypatch):
    """64 threads, as torch takes on a large host, and what they are set to."""
    now = [64]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[-1])
    monkeypatch.setattr(torch, "set_num_threads", now.append)
    return now


@pytest.mark.parametrize(
    ("kind", "then"), [("2 cores", 2), ("cgroup v1", 3), ("no limit", 64), ("nothing", 64)]
)
def test_threads_keep_to_it(tmp_path, threads, kind, then):
    keep_to_quota(written(tmp_path, FILES[kind][0]))
    assert threads[-1] == then


def test_what_the_user_says_wins(tmp_path, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    keep_to_quota(written(tmp_path, FILES["2 cores"][0]))
    assert threads == [64]


def test_fewer_threads_than_the_limit_stay(tmp_path, threads):
    threads.append(1)
    keep_to_quota(written(tmp_path, FILES["cgroup v1"][0]))
    assert threads[-1] == 1
