"""What fastkd knows about a network beyond its layers, in one attribute: `card_of(model)`.

`create_model` writes the card; rewrites, `freeze_backbone` and loaders of weights replace it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastkd.config.section import Normalization
from fastkd.models.planner import KernelChoice
from fastkd.models.report import RewriteReport
from fastkd.storage.description import CARD, NetworkFacts
from fastkd.storage.facts import DataFacts

__all__ = ["Card", "card_of", "sign", "title_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Origin and state of a network. All fields are unknown for a network built elsewhere."""

    name: str | None = None
    """Its name for `create_model`, with `num_classes` and `options`; None if it cannot build it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    normalization: Normalization | None = None
    """(mean, std) per channel that its weights expect, for images in [0, 1]."""
    data: DataFacts | None = None
    """What its weights were trained on: class names, image size, how pictures are shown to it. Of
    timm's networks what timm states; a training clears it."""
    head: tuple[str, ...] | None = None
    """Paths of the classifier layers; None until `classifier_paths` has searched."""
    new: tuple[str, ...] = ()
    """Paths of the layers that `new_head` left at their initial weights."""
    trained: tuple[str, ...] | None = None
    """If the backbone is frozen, paths of the layers that are trained."""
    unlearned: tuple[str, ...] = ()
    """Options, such as blocks, by which it differs from the network whose weights it has a part
    of: it has to be trained before it is worth anything."""
    report: RewriteReport | None = None
    """What the last rewrite changed."""
    kernels: KernelChoice | None = field(default=None, compare=False)
    """The last word to `use_kernels`, which a rewrite repeats on its result."""
    kernels_report: RewriteReport | None = field(default=None, compare=False)
    """What it found."""

    @property
    def facts(self) -> NetworkFacts:
        """What a weight file says about the network."""
        return NetworkFacts(
            architecture=self.name,
            num_classes=self.num_classes,
            options=dict(self.options),
            normalization=self.normalization,
            data=self.data,
        )


def card_of(model: nn.Module) -> Card | None:
    """The card of a network; None if fastkd neither built nor changed it."""
    return getattr(model, CARD, None)


def title_of(model: nn.Module) -> str:
    """For messages: the name that `create_model` knows, else the class."""
    card = card_of(model)
    return type(model).__name__ if card is None or card.name is None else card.name


def sign(model: nn.Module, card: Card) -> None:
    """Give a network this card.

    The attributes of fastkd 0.1 (`fastkd_name`, `num_classes`, `normalization`, `rewrite_report`)
    stay readable for one release; `fastkd_options` and `trained_layers` are gone.
    """
    attributes: dict[str, Any] = model.__dict__
    attributes[CARD] = card
    if card.name is None:
        attributes.pop("fastkd_name", None)
    else:
        attributes["fastkd_name"] = card.name
        attributes["num_classes"] = card.num_classes
        attributes["normalization"] = card.normalization
    if card.report is not None:
        attributes["rewrite_report"] = card.report
