"""The images of a user's loader, each once and in its order, for predictions.

A loader that would return them in another order, or not all of them, is refused: nobody could say
afterwards which prediction belongs to which image.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from fastkd.data.loaders.items import item_of
from fastkd.data.loaders.workers import from_workers
from fastkd.errors import UserError

__all__ = ["in_order"]

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_ROWS = 256


def in_order(items: Iterable[Any] | Tensor) -> Iterator[Tensor]:
    """Batches [N, C, H, W] of images, without what a sampler repeats to fill up.

    items: a loader of any packing that `item_of` reads (labels and ids are left aside); or the
        images as one tensor.

    Raises:
        UserError: the loader shuffles, drops images, or yields something else.
    """
    if isinstance(items, Tensor):
        items = item_of(items).images_NCHW.split(_ROWS)
    left = _own_rows(items)
    for item in from_workers(items, "num_workers"):
        images_NCHW = item_of(item).images_NCHW
        if left is not None:
            images_NCHW = images_NCHW[:left]
            left -= len(images_NCHW)
        if len(images_NCHW):
            yield images_NCHW


def _own_rows(items: Iterable[Any]) -> int | None:
    """How many images a sampler means to give this rank; None if the loader decides it."""
    if not isinstance(items, DataLoader):
        return None
    batches = items.batch_sampler
    sampler: Any = getattr(batches, "sampler", items.sampler)
    shuffled = isinstance(sampler, DistributedSampler) and sampler.shuffle
    if shuffled or isinstance(sampler, _SHUFFLING):
        raise UserError(
            f"predict gives one row an image, in the loader's order, and this loader shuffles "
            f"({type(sampler).__name__}): pass a DataLoader with shuffle=False"
        )
    if getattr(batches, "drop_last", False):
        size: int = getattr(batches, "batch_size", 1)
        if rest := len(sampler) % size:
            raise UserError(
                f"predict gives one row an image, and this loader leaves out the last {rest} of "
                f"{len(sampler)} (drop_last=True): pass a DataLoader with drop_last=False"
            )
    if not isinstance(sampler, DistributedSampler):
        return None
    images, ranks = len(sampler.dataset), sampler.num_replicas  # type: ignore[arg-type]
    if sampler.drop_last and images % ranks:
        raise UserError(
            f"predict gives one row an image, and this loader's DistributedSampler leaves out "
            f"{images % ranks} of {images} (drop_last=True): make it with drop_last=False"
        )
    return len(range(sampler.rank, images, ranks))
