"""How a step is wrapped for several ranks, in DistributedDataParallel."""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastkd.compute.ranks import World

__all__ = ["unsynchronised", "wrap_ddp"]


def wrap_ddp(
    step: nn.Module,
    world: World,
    *,
    ignore_buffers: Sequence[str] = (),
    may_idle: bool = False,
) -> nn.Module:
    """`step`, raw or from `torch.compile`, in DDP; unchanged if there is nothing to synchronise.

    Rank 0's buffers (batch norm statistics) go to the others before each forward pass, except
    `ignore_buffers`, named as in the raw step: frozen teachers and per-rank banks. The gradients
    of the wrapped step are views into DDP's buckets, which saves one copy of them.

    may_idle: parameters may get no gradient in a step, on one rank or on all: layers that never
    run, or are skipped at random. It costs a walk through the graph in every step.

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
    # torch.compile prefixes all names with _orig_mod, and DDP needs the names of the wrapped
    # step.
    names = [
        name for name, buffer in step.named_buffers(remove_duplicate=False) if id(buffer) in ignored
    ]
    # Private and untyped, but DDP has no public way.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(step, names)  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]
    if may_idle:
        # It is said once where all layers run, which nobody can know in advance.
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    return DistributedDataParallel(
        step,
        find_unused_parameters=may_idle,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def unsynchronised(step: nn.Module) -> AbstractContextManager[Any]:
    """A block whose gradients of a step from `wrap_ddp` stay on their rank, for a later sum."""
    return step.no_sync() if isinstance(step, DistributedDataParallel) else nullcontext()
