"""Both loaders of a data set, and what networks, runs and reports must know about it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from fastkd.config.section import Normalization
from fastkd.data.batch import Loader
from fastkd.data.config import DataConfig
from fastkd.data.facts import Facts
from fastkd.data.normalization import normalization
from fastkd.data.sources.folder import FolderIndex
from fastkd.data.sources.image_set import ImageSet
from fastkd.data.sources.label_maps import LabelMaps
from fastkd.data.sources.listing import listing_of
from fastkd.storage.facts import DataFacts, Framing

__all__ = ["DataPair", "Sources", "facts_of", "normalization_of"]

Sources = tuple[ImageSet | FolderIndex, ImageSet | FolderIndex] | tuple[LabelMaps, LabelMaps]
"""Training and validation images before they are decoded for the loaders."""


@dataclass(frozen=True)
class DataPair:
    """Both loaders of a data set and what networks and reports must know about it."""

    open_train: Callable[[], Loader]
    val: Loader
    facts: Facts
    name: str
    """Name of the data set."""
    backend: str
    """"resident", "torch" or "dali"."""
    why: str
    """Why data.backend=auto took it; empty if the recipe says it."""
    seed: int
    """Seed of order and augmentation."""
    sources: Sources
    """As they were found."""
    remark: Callable[[str], tuple[str, ...]]
    """`remarks`, with the end of the first line."""
    remember: Callable[[], DataFacts]
    """`remembered`"""

    @cached_property
    def train(self) -> Loader:
        """Batches of the training images.

        They are decoded and moved to the device on first use, so that an evaluation does not pay
        for it.
        """
        return self.open_train()

    @cached_property
    def val_labels_N(self) -> torch.Tensor:
        """Labels of all validation images, in the form of `facts.labels_N`."""
        return torch.from_numpy(self.sources[1].labels_N)

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """How many images a folder holds, and what a user should know of them: a line each.

        Some training images are opened for it on first use, so only who shows it asks.
        """
        return self.remark(f"data.backend={self.backend}{f' ({self.why})' if self.why else ''}")

    @cached_property
    def remembered(self) -> DataFacts:
        """What a run remembers about its data; some files are read for it on first use."""
        return self.remember()


def facts_of(
    data: DataConfig, sources: Sources, image_size: int | None, evaluation: Framing | None
) -> DataFacts:
    """What a run remembers of these images."""
    train, val = sources
    skips = data.on_bad == "skip"
    return DataFacts(
        name=data.name,
        classes=train.classes,
        image_size=image_size,
        evaluation=evaluation,
        normalization=normalization_of(data),
        train=listing_of(train, skips=skips),
        val=listing_of(val, skips=skips),
    )


def normalization_of(data: DataConfig) -> Normalization:
    """The recipe's values, or else those in the table of data sets."""
    mean, std = normalization(data.name)
    return data.mean or mean, data.std or std
