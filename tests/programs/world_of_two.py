"""What two ranks do together, once each: `world_of_two.py CASE FILE`, started by test_ranks.py."""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from alike import same_on_all_ranks
from torch import nn

from fastkd.compute.collectives import all_reduce_sum, join_rows, sync_buffers
from fastkd.compute.ranks import broadcast_object, open_world
from fastkd.compute.wrapping import wrap_ddp
from fastkd.errors import RunFailed
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
        [{"params": step.parameters()}], OptimConfig(lr=0.1, weight_decay=0.0), world.device
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
        [{"params": step.parameters()}], OptimConfig(lr=0.1, weight_decay=0.0), world.device
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


if __name__ == "__main__":
    run_case(*sys.argv[1:])
