"""What the ranks compute together; with a single process every function is the identity.

Trainer, guard, losses and evaluation call these on all ranks; `ranks` opens the world first.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd.compute.ranks import World

__all__ = [
    "all_reduce_sum",
    "first_of_ranks",
    "gather_rows",
    "join_rows",
    "split_evenly",
    "sync_buffers",
]

T = TypeVar("T")


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over the ranks in place and return it; it must be on the world's device."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def first_of_ranks(value: T | None, world: World) -> T | None:
    """The first value, by rank, that is not None, on every rank; it must be picklable."""
    if world.size == 1:
        return value
    values: list[T | None] = [None] * world.size
    dist.all_gather_object(values, value)
    return next((one for one in values if one is not None), None)


def split_evenly(num: int, parts: int) -> tuple[int, ...]:
    """Sizes of `parts` contiguous parts of `num` rows, larger ones first, as numpy.array_split."""
    each, larger = divmod(num, parts)
    return tuple(each + (part < larger) for part in range(parts))


def join_rows(rows: Tensor, rows_of_ranks: Sequence[int]) -> Tensor:
    """The rows of all ranks, in rank order and identical on every rank, with gradient.

    rows_of_ranks: number of rows per rank, see `TermInputs`; with fewer than two ranks `rows`
    is returned unchanged. Nothing waits for the device, and torch.compile keeps it in the graph.

    The gradient belongs to the sum of the ranks' losses. DDP takes the mean of the ranks'
    gradients, so a loss on the joined rows that every rank computes counts once, as in a single
    process.

    Raises:
        ValueError: this rank's number of rows differs from `rows_of_ranks`.
    """
    if len(rows_of_ranks) < 2:
        return rows
    rank = dist.get_rank()
    if len(rows) != rows_of_ranks[rank]:
        raise ValueError(f"rank {rank} has {len(rows)} rows, expected {rows_of_ranks[rank]}")
    return _JoinRows.apply(rows, sum(rows_of_ranks[:rank]), sum(rows_of_ranks))


def gather_rows(rows: Tensor | None, world: World) -> Tensor | None:
    """The rows of all ranks in rank order, on every rank; for evaluation.

    rows: [n, ...] with any n, equal in the other dimensions and in type; None if this rank has
    none. Returns None if no rank has any. Waits for the device; call it on all ranks.
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
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        # A copy: other holders of this gradient must not see the sum.
        grad = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.own], None, None


def sync_buffers(module: nn.Module, *, ignore: Sequence[str] = ()) -> None:
    """Give every rank rank 0's buffers, as DDP does before a forward pass; call it on all ranks."""
    if dist.is_initialized():
        for name, buffer in module.named_buffers():
            if name not in ignore:
                dist.broadcast(buffer, src=0)
