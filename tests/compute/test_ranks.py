"""Two processes over gloo: same decisions, same weights, and no rank left hanging."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastkd.compute.collectives import all_reduce_sum, split_evenly
from fastkd.compute.ranks import World, broadcast_object, close_world, init_world, open_world
from fastkd.compute.wrapping import wrap_ddp
from fastkd.errors import RunFailed, UserError


@pytest.fixture(scope="module")
def launch(ranks):
    """Run the program as two ranks and return what each of them found."""

    def run(case, target):
        ranks(2, "world_of_two.py", case, target)
        return [json.loads(Path(f"{target}.{rank}").read_text()) for rank in range(2)]

    return run


@pytest.fixture(scope="module")
def both(launch, tmp_path_factory):
    return launch("all", tmp_path_factory.mktemp("ranks") / "found")


def test_each_rank_knows_its_place(both):
    assert [found["collectives"]["world"] for found in both] == [
        [0, 2, "cpu", "gloo"],
        [1, 2, "cpu", "gloo"],
    ]
    assert [found["collectives"]["main"] for found in both] == [[True], [False]]


def test_collectives_reach_every_rank(both):
    for found in both:
        assert found["collectives"]["sum"] == 3.0
        assert found["collectives"]["object"] == 0
        assert found["collectives"]["same"] == [False, True]


def test_rows_of_ranks_join_with_their_gradient(both):
    for rank, found in enumerate(both):
        whole, factors, said, alone = found["collectives"]["joined"]
        assert whole == [[0, 1], [2, 3], [4, 5], [10, 11], [12, 13]]
        # d/dx of x^2 on rank 0 and of 2 x^2 on rank 1, added up.
        assert factors == ([0.0, 6.0] if rank == 0 else [6.0])
        assert said == f"rank {rank} has {3 - rank} rows, expected {2 + rank}"
        assert alone


@pytest.mark.parametrize(("num", "parts"), [(9, 2), (16, 3), (2, 4), (64, 8)])
def test_parts_are_those_of_array_split(num, parts):
    expected = [len(part) for part in np.array_split(np.arange(num), parts)]
    assert list(split_evenly(num, parts)) == expected


@pytest.mark.parametrize("case", ["ddp", "ddp compiled"])
def test_one_bad_rank_makes_all_ranks_skip_and_stay_equal(both, case):
    for found in both:
        assert found[case]["wrapped"] == "DistributedDataParallel"
        assert found[case]["oks"] == [True, False, True]
        assert found[case]["counts"] == [0, 1]
        assert found[case]["unchanged"]
        assert found[case]["same"]


@pytest.mark.parametrize("case", ["ddp", "ddp compiled"])
def test_ignored_buffers_stay_each_rank_s_own(both, case):
    assert [found[case]["rows"] for found in both] == [[0.0, 0.0], [1.0, 1.0]]


def test_a_loss_that_is_bad_on_one_rank_only_is_bad_everywhere(both):
    assert [found["loss alone"] for found in both] == [{"ok": False, "counts": [1, 1]}] * 2


def test_a_step_without_parameters_is_not_wrapped(both):
    assert not any(found["frozen"]["wrapped"] for found in both)
    assert all(found["closed"] for found in both)


def test_a_failing_rank_frees_the_others_at_once(launch, tmp_path):
    rank_0, rank_1 = launch("crash", tmp_path / "found")
    assert rank_1["error"] == "RunFailed"
    assert "error" in rank_0
    assert rank_0["seconds"] < 20  # the collective's own timeout is 60 s


def test_a_single_process_needs_no_group():
    with open_world("cpu") as world:
        assert (world.rank, world.size, world.backend) == (0, 1, None)
        assert not dist.is_initialized()
        step = nn.Linear(3, 4)
        assert wrap_ddp(step, world) is step
        assert broadcast_object("here") == "here"
        assert all_reduce_sum(torch.ones(1)).item() == 1
    close_world()


def test_the_group_of_the_caller_is_used_and_kept(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with open_world("cpu") as world:
            assert (world.rank, world.size) == (0, 1)
        assert dist.is_initialized()
    finally:
        close_world()


def test_unknown_ignored_buffer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"not buffers of the step: bank\.row"):
        wrap_ddp(nn.BatchNorm1d(4), fake_world(size=2), ignore_buffers=["bank.row"])


def fake_world(size):
    return World(rank=0, local_rank=0, size=size, device=torch.device("cpu"), backend="gloo")


def test_devices_that_do_not_exist_are_refused(monkeypatch):
    with pytest.raises(UserError, match="device=gpu is unknown"):
        init_world("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        init_world("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"process 2 .* more processes than the 2 GPUs") as caught:
        init_world("auto")
    assert not caught.value.shared  # rank 0 has one, and would say nothing


def test_ranks_that_do_not_come_are_reported(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in (
        ("RANK", 1),
        ("WORLD_SIZE", 2),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", port),
    ):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RunFailed, match="process 1 of 2 could not join the others within 1 s"):
        init_world("cpu", timeout_s=1)
