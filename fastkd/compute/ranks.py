"""The ranks of a run: who they are, on which device, and how rank 0 decides for all.

Flow: `cli` opens the world around everything else (`with open_world(device) as world`). Ranks come
from torchrun's environment (RANK, LOCAL_RANK, WORLD_SIZE), from that of another launcher
(`launchers`), or from the caller's existing process group; a single process has none.
"""

import atexit
import gc
import itertools
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import (
    rendezvous,  # pyright: ignore[reportUnknownVariableType]
)

from fastkd.compute.launchers import take_ranks
from fastkd.errors import FastKDError, RunFailed, UserError

__all__ = [
    "DeviceChoice",
    "World",
    "broadcast_object",
    "close_world",
    "init_world",
    "on_main",
    "open_world",
]

T = TypeVar("T")
DeviceChoice = Literal["auto", "cpu", "cuda"]

_TIMEOUT_S = 600.0
_STORES: dict[tuple[str | None, str | None], Any] = {}
# Groups that this process has opened; all ranks open the same ones.
_GROUPS = itertools.count()


@dataclass(frozen=True)
class World:
    """What one process knows about the run it belongs to."""

    rank: int
    """0 to size - 1; rank 0 writes files and talks to the user."""
    local_rank: int
    """Rank among the processes of this host."""
    size: int
    """Number of processes on all hosts."""
    device: torch.device
    backend: Literal["nccl", "gloo"] | None
    """None: a single process, no process group."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0


def init_world(device: DeviceChoice = "auto", *, timeout_s: float = _TIMEOUT_S) -> World:
    """Find this process's rank and device, and join the other processes if there are any.

    `timeout_s` bounds the wait for the others, here and in every later collective.

    Raises:
        UserError: no such device, or more processes on this host than GPUs.
        RunFailed: the other processes did not come.
    """
    if device not in get_args(DeviceChoice):
        choices = ", ".join(get_args(DeviceChoice))
        raise UserError(f"device={device} is unknown; choose one of {choices}")
    joined = dist.is_initialized()
    launcher = None if joined else take_ranks(os.environ)
    size = dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1"))
    rank = dist.get_rank() if joined else int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise UserError(
            "device=cuda was requested, but torch sees no CUDA device; `fastkd doctor` says more"
        )
    if device == "cpu" or not has_cuda:
        chosen = torch.device("cpu")
    else:
        if launcher and torch.cuda.device_count() == 1:
            # Such launchers can show each task its own GPU only.
            local_rank = 0
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this host has no GPU: {launcher or 'torchrun'} started "
                f"more processes than the {torch.cuda.device_count()} GPUs that torch sees; lower "
                "--nproc-per-node or use device=cpu",
                shared=False,
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    if size == 1:
        return World(rank=0, local_rank=local_rank, size=1, device=chosen, backend=None)
    backend: Literal["nccl", "gloo"] = "nccl" if chosen.type == "cuda" else "gloo"
    if joined:
        return World(rank, local_rank, size, chosen, backend)
    try:
        timeout = timedelta(seconds=timeout_s)
        store = _store(timeout)
        dist.init_process_group(
            backend,
            store=PrefixStore(f"fastkd/{next(_GROUPS)}", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=chosen if backend == "nccl" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise RunFailed(
            f"process {rank} of {size} could not join the others within {timeout_s:.0f} s: {error}",
            shared=False,
        ) from error
    return World(rank, local_rank, size, chosen, backend)


def _store(timeout: timedelta) -> Any:
    """Where the ranks meet, kept for later groups of this process.

    Rank 0 hosts it. If every group had its own, a rank that is quick to open the next one would
    find the old one at the same address, and wait there forever.
    """
    address = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not _STORES:
        atexit.register(_leave_no_thread)
    if address not in _STORES:
        _STORES[address], _, _ = next(rendezvous("env://", timeout=timeout))
    return _STORES[address]


def _leave_no_thread() -> None:
    """End the threads of groups and stores: Python's teardown would abort the process over them."""
    gc.collect()  # networks in DDP, which hold their group, lie in cycles
    _STORES.clear()


def close_world(*, failed: bool = False) -> None:
    """Leave the process group, if there is one; may be called twice.

    `failed`: this process leaves in the middle of the run. Over gloo the closing
    connection wakes the others with an error. NCCL would first wait for collectives that will
    never come, so it is left to the end of the process, at which torchrun stops the others.
    """
    if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


@contextmanager
def open_world(device: DeviceChoice = "auto", *, timeout_s: float = _TIMEOUT_S) -> Generator[World]:
    """`init_world` and `close_world` around a block; an exception in it frees the other ranks.

    The caller's process group, if any, is used and stays open.

    Raises:
        RunFailed: over gloo, another process ended or hung in the middle of a collective.
    """
    owned = not dist.is_initialized()
    world = init_world(device, timeout_s=timeout_s)
    failed = True
    try:
        yield world
        failed = False
    except RuntimeError as error:
        # gloo's messages when another process does not answer; NCCL ends this process on its own.
        if "gloo/transport" not in str(error):
            raise
        raise RunFailed(
            f"another process of this run has ended or hangs, so this one cannot continue ({error})"
        ) from error
    finally:
        if owned:
            close_world(failed=failed)


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` on every rank; it must be picklable. Others may pass anything."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(world: World, work: Callable[[], T]) -> T:
    """Do file-system work on rank 0 alone; its result or its error reaches every rank."""
    if world.size == 1:
        return work()
    outcome: tuple[T | None, Exception | None] = (None, None)
    if world.is_main:
        try:
            outcome = (work(), None)
        except (FastKDError, OSError) as error:
            outcome = (None, error)
    result, error = broadcast_object(outcome)
    if error is not None:
        raise error
    return result
