"""Whether a user's loader can be used at all: it has a length, begins anew, and is shared by ranks.

Looked at before anything is built; `fastkd.data.loaders.foreign` then reads it.
"""

from collections.abc import Iterable, Iterator, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from fastkd.compute.placement import Placement
from fastkd.compute.ranks import World
from fastkd.data.loaders.items import item_of, naming
from fastkd.data.loaders.workers import from_workers
from fastkd.errors import UserError

__all__ = [
    "BEST",
    "ONCE",
    "LoaderItem",
    "Shown",
    "check_loader",
    "images_per_epoch",
    "layout_of",
    "num_samples",
    "num_steps",
    "peek",
]

LoaderItem = Any
"""(images, labels), (images, labels, sample ids), a mapping with such keys, or images alone."""

ONCE = "can be read only once, and an epoch is not enough"
"""What a loader that does not begin anew is told, as the middle of a sentence."""

BEST = "a torch DataLoader over a map-style data set"
"""What to use instead, as the end of a sentence."""


class Shown(NamedTuple):
    """The first batch of a loader."""

    images_NCHW: Tensor
    """On the device."""
    labels: Any
    """As they were yielded; None if there are none."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, W]."""
        _, channels, height, width = self.images_NCHW.shape
        return (channels, height, width)


def peek(name: str, items: Iterable[LoaderItem], placement: Placement) -> Shown:
    """The first batch; UserError if there is none, or if there would be none in a second epoch."""
    iterator = iter(items)
    item = next(from_workers(iterator, "num_workers"), None)
    if item is None:
        raise UserError(f"{name} yields nothing: its first batch is missing")
    if not isinstance(items, DataLoader) and iter(items) is iterator:
        raise UserError(f"{name} {ONCE}: {BEST}")
    with naming(name):
        images, labels, _ = item_of(item)
    layout = layout_of(placement.channels_last)
    return Shown(images.to(placement.device, torch.float32, memory_format=layout), labels)


def images_per_epoch(items: Iterable[LoaderItem], batch_size: int) -> int:
    """Number of images in the data set; without a data set, full batches of `batch_size`."""
    return num_samples(items) or num_steps(items) * batch_size


def check_loader(
    name: str, loader: Iterable[LoaderItem], world: World, *, exact: bool = False
) -> None:
    """UserError for a loader that has no length, can be read only once, or is not sharded.

    exact: the ranks together must see every image once, as in an evaluation.
    """
    try:
        if not isinstance(loader, Sized) or not len(loader):
            raise TypeError
    except TypeError:
        raise UserError(f"{name} needs a length above 0: {_with_length(loader)}") from None
    if isinstance(loader, Iterator):
        raise UserError(f"{name} {ONCE}: {BEST}")
    if world.size == 1 or not isinstance(loader, DataLoader):
        return
    shares = "sampler=torch.utils.data.DistributedSampler(dataset)"
    if exact:
        shares = "sampler=range(rank, len(dataset), world_size)"
    # A DataLoader with a batch sampler, which may shard, also has a sampler that it does not use.
    own = type(loader.batch_sampler) is not BatchSampler and loader.batch_sampler is not None
    if not own and isinstance(loader.sampler, RandomSampler | SequentialSampler):
        raise UserError(
            f"{name} gives each of the {world.size} processes all images: pass {shares} to the "
            f"DataLoader"
        )
    if exact and isinstance(loader.sampler, DistributedSampler):
        images = len(loader.sampler.dataset)  # type: ignore[arg-type]
        if images % world.size:
            raise UserError(
                f"{name} counts some images twice or not at all: its DistributedSampler gives each "
                f"of the {world.size} processes equally many of {images}: pass {shares} instead"
            )


def _with_length(loader: Any) -> str:
    """What to do about a loader without one."""
    if not isinstance(loader, DataLoader):
        return BEST
    if isinstance(loader.dataset, IterableDataset):
        return (
            f"{BEST}, or give its IterableDataset a __len__, the number of samples that one "
            f"process yields in an epoch"
        )
    images, size = num_samples(loader), loader.batch_size
    if images and size and images < size:
        return (
            f"its {images} images are fewer than batch_size={size}, and drop_last=True drops them"
        )
    return "its data set is empty"


def num_steps(items: Iterable[LoaderItem]) -> int:
    """Batches in an epoch; 0 if it is not known."""
    return len(items) if isinstance(items, Sized) else 0


def num_samples(items: Iterable[LoaderItem]) -> int:
    """Samples of the data set; 0 without one."""
    dataset = getattr(items, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else 0


def layout_of(channels_last: bool) -> torch.memory_format:
    """Memory layout of the images."""
    return torch.channels_last if channels_last else torch.contiguous_format
