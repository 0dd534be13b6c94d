"""The ranks of a run: who they are, how they talk, and how a step is wrapped for them.

Flow: `cli` opens the world around everything else (`with open_world(device) as world`); trainer,
guard and evaluation use the small collectives; `wrap_ddp` wraps the (compiled) step. Ranks come
from torchrun's environment (RANK, LOCAL_RANK, WORLD_SIZE), or from the process group that the
caller has already; with a single process there is none and every function here is the identity.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastkd.errors import FastKDError, RunFailed, UserError

__all__ = [
    "World",
    "all_reduce_sum",
    "broadcast_object",
    "close_world",
    "gather_rows",
    "init_world",
    "join_rows",
    "on_main",
    "open_world",
    "same_on_all_ranks",
    "split_evenly",
    "sync_buffers",
    "unsynchronised",
    "wrap_ddp",
]

T = TypeVar("T")
DeviceChoice = Literal["auto", "cpu", "cuda"]

_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class World:
    """What one process knows about the run it belongs to."""

    rank: int
    """0 to size - 1; rank 0 writes files and talks to the user."""
    local_rank: int
    """Rank among the processes of this host; also the number of its GPU."""
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
    size = dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1"))
    rank = dist.get_rank() if joined else int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise UserError(
            "device=cuda was asked for, but torch sees no CUDA device; `fastkd doctor` says more"
        )
    if device == "cpu" or not has_cuda:
        chosen = torch.device("cpu")
    else:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this host has no GPU: torchrun started more processes "
                f"than the {torch.cuda.device_count()} GPUs that torch sees; lower "
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
        dist.init_process_group(
            backend,
            timeout=timedelta(seconds=timeout_s),
            device_id=chosen if backend == "nccl" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise RunFailed(
            f"process {rank} of {size} could not join the others within {timeout_s:.0f} s: {error}",
            shared=False,
        ) from error
    return World(rank, local_rank, size, chosen, backend)


def close_world(*, failed: bool = False) -> None:
    """Leave the process group, if there is one; twice is allowed.

    `failed` says that this process leaves in the middle of the run. Over gloo the closing
    connection wakes the others with an error. NCCL would first wait for collectives that will
    never come, so it is left to the end of the process, at which torchrun stops the others.
    """
    if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


@contextmanager
def open_world(device: DeviceChoice = "auto", *, timeout_s: float = _TIMEOUT_S) -> Iterator[World]:
    """`init_world` and `close_world` around a block; an exception in it frees the other ranks.

    A process group of the caller is used and stays open.

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
        # gloo's words where another process does not answer; NCCL ends this process by itself.
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


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over the ranks in place and return it; it lies on the world's device."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def split_evenly(num: int, parts: int) -> tuple[int, ...]:
    """Sizes of `parts` contiguous parts of `num` rows, larger ones first, as numpy.array_split."""
    each, larger = divmod(num, parts)
    return tuple(each + (part < larger) for part in range(parts))


def join_rows(rows: Tensor, rows_of_ranks: Sequence[int]) -> Tensor:
    """The rows of all ranks, in the order of the ranks and alike on each of them, with gradient.

    rows_of_ranks: how many each rank has, as `TermInputs` says; with fewer than two ranks `rows`
    itself comes back. Nothing waits for the device, and torch.compile keeps it in the graph.

    The gradient belongs to the sum of the ranks' losses. DDP takes the mean of the ranks'
    gradients, so a loss of the joined rows that every rank computes counts once, as in a single
    process.

    Raises:
        ValueError: this rank has another number of rows than `rows_of_ranks` says.
    """
    if len(rows_of_ranks) < 2:
        return rows
    rank = dist.get_rank()
    if len(rows) != rows_of_ranks[rank]:
        raise ValueError(f"rank {rank} has {len(rows)} rows, expected {rows_of_ranks[rank]}")
    return _JoinRows.apply(rows, sum(rows_of_ranks[:rank]), sum(rows_of_ranks))


def gather_rows(rows: Tensor | None, world: World) -> Tensor | None:
    """The rows of all ranks in the order of the ranks, on each of them; for evaluation.

    rows: [n, ...] of any n, alike in the other dimensions and in type; None where this rank has
    none. None comes back where no rank has any. Waits for the device; call it on all ranks.
    """
    if world.size == 1:
        return rows
    shapes: list[Any] = [None] * world.size
    dist.all_gather_object(shapes, None if rows is None else (tuple(rows.shape), rows.dtype))
    first = next((shape for shape in shapes if shape), None)
    if first is None:
        return None
    (_, *inner), dtype = first
    if rows is None:
        rows = torch.zeros(0, *inner, dtype=dtype, device=world.device)
    return join_rows(rows, [shape[0][0] if shape else 0 for shape in shapes])


class _JoinRows(torch.autograd.Function):
    """Sums the ranks' rows, each placed among zeros; a gather needs equal counts."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, start: int, total: int) -> Tensor:
        ctx.own = slice(start, start + len(rows))
        joined = rows.new_zeros(total, *rows.shape[1:])
        joined[ctx.own] = rows
        dist.all_reduce(joined)
        return joined

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # A copy: other holders of this gradient must not see the sum.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.own], None, None


def sync_buffers(module: nn.Module, *, ignore: Sequence[str] = ()) -> None:
    """Give every rank rank 0's buffers, as DDP does before a forward pass; call it on all ranks."""
    if dist.is_initialized():
        for name, buffer in module.named_buffers():
            if name not in ignore:
                dist.broadcast(buffer, src=0)


def wrap_ddp(
    step: nn.Module,
    world: World,
    *,
    ignore_buffers: Sequence[str] = (),
) -> nn.Module:
    """`step`, raw or from `torch.compile`, in DDP; as it is when there is nothing to synchronise.

    Rank 0's buffers (batch norm statistics) go to the others before each forward pass, except
    `ignore_buffers`, named as in the raw step: frozen teachers and per-rank banks. The gradients
    of the wrapped step are views into DDP's buckets, which saves one copy of them.

    Raises:
        ValueError: a name in `ignore_buffers` is not a buffer of the step.
    """
    if world.size == 1 or not any(parameter.requires_grad for parameter in step.parameters()):
        return step
    raw = getattr(step, "_orig_mod", step)
    buffers = dict(raw.named_buffers(remove_duplicate=False))
    if unknown := sorted(set(ignore_buffers) - set(buffers)):
        raise ValueError(f"these are not buffers of the step: {', '.join(unknown)}")
    ignored = {id(buffers[name]) for name in ignore_buffers}
    # torch.compile prefixes all names with _orig_mod, and DDP wants them as the wrapped step
    # has them.
    names = [
        name for name, buffer in step.named_buffers(remove_duplicate=False) if id(buffer) in ignored
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, names)
    return DistributedDataParallel(
        step,
        device_ids=[world.local_rank] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def unsynchronised(step: nn.Module) -> AbstractContextManager[Any]:
    """A block whose gradients of a step from `wrap_ddp` stay on their rank, for a later sum."""
    return step.no_sync() if isinstance(step, DistributedDataParallel) else nullcontext()


def same_on_all_ranks(module: nn.Module) -> bool:
    """Whether all parameters and buffers are bitwise those of rank 0; for tests and debugging."""
    if not dist.is_initialized():
        return True
    num_different = torch.zeros((), device=next(module.parameters()).device)
    for tensor in [*module.parameters(), *module.buffers()]:
        mine = tensor.detach().contiguous().flatten().view(torch.uint8)
        of_rank_0 = mine.clone()
        dist.broadcast(of_rank_0, src=0)
        num_different += (mine != of_rank_0).any()
    return all_reduce_sum(num_different).item() == 0
