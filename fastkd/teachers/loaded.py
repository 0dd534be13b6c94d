"""A network as it was loaded, with its settings from a recipe or its weight file."""

from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from fastkd.compute.precision import PrecisionName
from fastkd.config.section import Normalization
from fastkd.models.card import Card
from fastkd.models.intake import Remedy

__all__ = ["LoadedNet", "unlearned"]


@dataclass(frozen=True)
class LoadedNet:
    """A teacher before it is bound to taps and views, or a student."""

    model: nn.Module
    normalization: Normalization | None = None
    """The normalisation that its weights expect; None: the data's."""
    resolution: int | None = None
    """Side in pixels of the images it expects; None: the views'."""
    class_map: tuple[int, ...] | None = None
    """The network's output for every class of the data; None if the orders agree."""
    name: str = "teacher"
    """For messages."""
    precision: PrecisionName | None = None
    """Autocast type of its forward pass; None: the run's."""
    compiled: bool | None = None
    """Whether it is compiled; None: as in the run."""
    notes: tuple[str, ...] = ()
    """What the user should know about how it was loaded."""
    remedy: Remedy = field(default_factory=Remedy)
    """What the user changes if it refuses the images."""
    bound: MutableMapping[Hashable, Any] = field(
        init=False, repr=False, compare=False, default_factory=WeakValueDictionary
    )
    """What `bind_teacher` has made of it for runs that are still alive, by how it was bound: those
    that are trained together share one."""

    def image_shape(self, of_data: tuple[int, int, int]) -> tuple[int, int, int]:
        """[C, H, W] of the images that it sees."""
        channels, height, width = of_data
        side = self.resolution
        return (channels, height, width) if side is None else (channels, side, side)


def unlearned(card: Card, file: object, key: str, why: str) -> str:
    """What is wrong with a network that has only a part of the weights it was given."""
    changes = " and ".join(f"{key}.{option}" for option in card.unlearned)
    verb = "changes" if len(card.unlearned) == 1 else "change"
    return f"{file} holds the whole {card.name}, and {changes} {verb} it: {why}, or leave that out"
