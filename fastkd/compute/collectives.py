"""What the ranks compute together; with a single process every function is the identity.

Trainer, losses and evaluation call these on all ranks; `ranks` opens the world first.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.compute.ranks import World

__all__ = [
    "all_reduce_sum",
    "first_of_ranks",
    "gather_rows",
    "join_rows",
    "on_any_rank",
    "on_ranks",
    "rows_of_partners",
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
    return next((one for one in on_ranks(value, world) if one is not None), None)


def on_ranks(value: T, world: World) -> list[T]:
    """This value of every rank, by rank; it must be picklable."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def on_any_rank(here: bool, world: World) -> bool:
    """Whether it holds on any rank."""
    return any(on_ranks(here, world))


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
    # Each rank's rows among zeros: a gather needs equal counts.
    before, after = sum(rows_of_ranks[:rank]), sum(rows_of_ranks[rank + 1 :])
    return _sum_over_ranks(F.pad(rows, (*[0, 0] * (rows.dim() - 1), before, after)))


def rows_of_partners(rows: Tensor, partner_N: np.ndarray, rows_of_ranks: Sequence[int]) -> Tensor:
    """Of the rows of all ranks together, those with these numbers that belong to this rank.

    rows: of this rank, [n, ...]; without gradient. partner_N: int64, for each row of all ranks the
    number of another one; the same on every rank. Each rank is sent what it needs and no more.
    """
    ends = np.cumsum(rows_of_ranks)
    parts = [slice(end - num, end) for num, end in zip(rows_of_ranks, ends, strict=True)]
    mine = parts[dist.get_rank()]
    owner_N = np.searchsorted(ends, partner_N, side="right")
    wanted = [partner_N[part][owner_N[part] == dist.get_rank()] - mine.start for part in parts]
    sent = torch.as_tensor(np.concatenate(wanted), device=rows.device)
    # As bytes, because gloo does not send every type.
    out = rows.detach().index_select(0, sent).contiguous()
    raw = out.flatten(1).view(torch.uint8) if out.dim() > 1 else out[:, None].view(torch.uint8)
    owners = owner_N[mine]
    received = raw.new_empty((len(owners), raw.shape[1]))
    dist.all_to_all_single(
        received,
        raw,
        np.bincount(owners, minlength=len(parts)).tolist(),
        [len(one) for one in wanted],
    )
    # They come in the order of their owners.
    places = np.argsort(np.argsort(owners, kind="stable"))
    own = received.index_select(0, torch.as_tensor(places, device=rows.device)).view(rows.dtype)
    return own.view(len(owners), *rows.shape[1:])


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


@torch.library.custom_op("fastkd::sum_over_ranks", mutates_args=())
def _sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over all ranks; its gradient is the sum of the ranks' gradients.

    An op of its own, because torch.compile of torch 2.11 drops the gradient of an autograd function
    with a collective in it, without a word.
    """
    # A copy: other holders of this tensor, or of this gradient, must not see the sum.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _same_shape(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _sum_gradients(_: Any, gradient: Tensor) -> Tensor:
    return _sum_over_ranks(gradient)


_op: Any = _sum_over_ranks  # torch annotates its methods in part only
_op.register_fake(_same_shape)
_op.register_autograd(_sum_gradients)


def sync_buffers(module: nn.Module, *, ignore: Sequence[str] = ()) -> None:
    """Give every rank rank 0's buffers, as DDP does before a forward pass; call it on all ranks."""
    if dist.is_initialized():
        for name, buffer in module.named_buffers():
            if name not in ignore:
                dist.broadcast(buffer, src=0)
