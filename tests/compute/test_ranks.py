"""Two processes over gloo: same decisions, same weights, and no rank left hanging.

This file is also the program that the ranks run: `python test_ranks.py CASE FILE`.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastkd.compute.ranks import (
    all_reduce_sum,
    broadcast_object,
    close_world,
    init_world,
    join_rows,
    open_world,
    same_on_all_ranks,
    split_evenly,
    sync_buffers,
    wrap_ddp,
)
from fastkd.errors import RunFailed, UserError
from fastkd.training.config import OptimConfig
from fastkd.training.guard import Guard
from fastkd.training.optim import build_optimizer


class Step(nn.Module):
    """A student with batch norm, a frozen teacher's buffer and a bank that each rank keeps."""

    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.bank = nn.Module()
        self.bank.register_buffer("rows", torch.zeros(2))

    def forward(self, x):
        return self.student(x).square().mean()


def snapshot(step, optimizer):
    moments = [state["momentum_buffer"] for state in optimizer.state.values()]
    return [t.detach().clone() for t in [*step.parameters(), *step.buffers(), *moments]]


def collectives(world):
    """Every small function, once."""
    net = nn.BatchNorm1d(2)
    nn.init.constant_(net.running_mean, world.rank)
    before = same_on_all_ranks(net)
    sync_buffers(net)
    return {
        "world": [world.rank, world.size, str(world.device), world.backend],
        "main": [world.is_main],
        "sum": all_reduce_sum(torch.tensor([1.0 + world.rank])).item(),
        "object": broadcast_object({"rank": world.rank, "path": Path("runs")})["rank"],
        "same": [before, same_on_all_ranks(net)],
        "joined": joined(world),
    }


def joined(world):
    """Three rows of rank 0 and two of rank 1; what each asks of them has another factor."""
    rows = torch.arange(6.0).reshape(3, 2)[: 3 - world.rank] + 10 * world.rank
    rows.requires_grad_()
    whole = join_rows(rows, (3, 2))
    (whole.square().sum() * (1 + world.rank)).backward()
    try:
        join_rows(rows, (2, 3))
    except ValueError as error:
        said = str(error)
    alone = join_rows(rows, (len(rows),)) is rows
    return [whole.tolist(), (rows.grad / rows.detach().clamp(min=1)).unique().tolist(), said, alone]


def ddp(world, *, compiled):
    """Three steps, the second bad on rank 1 only; ranks start from different weights."""
    torch.manual_seed(world.rank)
    step = Step()
    nn.init.constant_(step.bank.rows, world.rank)
    unit = torch.compile(step, dynamic=False, backend="eager") if compiled else step
    runner = wrap_ddp(unit, world, ignore_buffers=["bank.rows"])
    optimizer = build_optimizer(
        [{"params": step.parameters()}], OptimConfig(lr=0.1, weight_decay=0.0)
    )
    guard = Guard(step, optimizer, max_skips=5, world_size=world.size)
    oks, unchanged = [], None
    for number in range(3):
        x = torch.randn(6, 3)
        if number == 1 and world.rank == 1:
            x[0, 0] = float("nan")
        optimizer.zero_grad()
        guard.before_step()
        # Taken before the forward pass, in which DDP sends rank 0's statistics around.
        before = snapshot(step, optimizer)
        loss = runner(x)
        if not (number == 1 and world.rank == 1):
            assert torch.isfinite(loss)
        loss.backward()
        ok = guard.judge(loss, [p.grad for p in step.parameters()])
        guard.apply(ok)
        oks.append(bool(ok))
        if number == 1:
            after = snapshot(step, optimizer)
            unchanged = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    sync_buffers(step.student)
    return {
        "wrapped": type(runner).__name__,
        "oks": oks,
        "unchanged": unchanged,
        "counts": guard.counts(),
        "same": same_on_all_ranks(step.student),
        "rows": step.bank.rows.tolist(),
    }


def loss_alone(world):
    """Only the loss of rank 1 is NaN, its gradients are fine: rank 0 cannot know by itself."""
    step = Step()
    optimizer = build_optimizer(
        [{"params": step.parameters()}], OptimConfig(lr=0.1, weight_decay=0.0)
    )
    guard = Guard(step, optimizer, max_skips=5, world_size=world.size)
    guard.before_step()
    loss = torch.tensor(float("nan") if world.rank == 1 else 0.5)
    ok = guard.judge(loss, [torch.ones(3)])
    guard.apply(ok)
    return {"ok": bool(ok), "counts": guard.counts()}


def frozen(world):
    """Nothing to train, nothing to synchronise."""
    step = Step().requires_grad_(False)
    return {"wrapped": wrap_ddp(step, world) is not step}


def crash(world):
    """Rank 1 fails while rank 0 waits for it."""
    if world.rank == 1:
        raise RunFailed("rank 1 gives up")
    all_reduce_sum(torch.zeros(1))
    return {}


def run_case(case, target):
    started = time.monotonic()
    try:
        with open_world("cpu", timeout_s=60) as world:
            if case == "crash":
                found = crash(world)
            else:
                found = {
                    "collectives": collectives(world),
                    "ddp": ddp(world, compiled=False),
                    "ddp compiled": ddp(world, compiled=True),
                    "loss alone": loss_alone(world),
                    "frozen": frozen(world),
                }
    except (RunFailed, RuntimeError) as error:
        found = {"error": type(error).__name__, "seconds": time.monotonic() - started}
    found["closed"] = not dist.is_initialized()
    Path(f"{target}.{os.environ['RANK']}").write_text(json.dumps(found))


def launch(case, target):
    """Run this file as two ranks and return what each of them found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, case, str(target)]
        ranks.append(
            subprocess.Popen(command, env=os.environ | place, stderr=subprocess.PIPE, text=True)
        )
    messages = [rank.communicate(timeout=180)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(messages)
    return [json.loads(Path(f"{target}.{rank}").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
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


def test_a_failing_rank_frees_the_others_at_once(tmp_path):
    rank_0, rank_1 = launch("crash", tmp_path / "found")
    assert rank_1["error"] == "RunFailed"
    assert "error" in rank_0
    assert rank_0["seconds"] < 20  # the collective's own timeout is 60 s


def test_a_single_process_needs_no_group():
    with open_world("cpu") as world:
        assert (world.rank, world.size, world.backend) == (0, 1, None)
        assert not dist.is_initialized()
        step = Step()
        assert wrap_ddp(step, world) is step
        assert broadcast_object("here") == "here"
        assert all_reduce_sum(torch.ones(1)).item() == 1
        assert same_on_all_ranks(step)
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
    with pytest.raises(ValueError, match=r"no buffers of the step: bank\.row"):
        wrap_ddp(Step(), fake_world(size=2), ignore_buffers=["bank.row"])


def fake_world(size):
    from fastkd.compute.ranks import World

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


if __name__ == "__main__":
    run_case(*sys.argv[1:])
