"""What a weight file says about its network: metadata from which `create_model` rebuilds it.

What it says about the data is in `fastkd.storage.facts`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastkd.config.section import Normalization
from fastkd.storage.facts import DataFacts

__all__ = ["CARD", "NetworkFacts", "describe", "facts_of"]

CARD = "fastkd_card"
"""The attribute that holds a network's `fastkd.models.card.Card`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFacts:
    """Name, class count, options and normalisation of a network, and the data it learned from."""

    architecture: str | None = None
    num_classes: int | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    normalization: Normalization | None = None
    data: DataFacts | None = None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "NetworkFacts":
        """Read what `to_metadata` wrote. Raises ValueError, TypeError or LookupError otherwise."""
        mean_std = json.loads(metadata.get("normalization", "null"))
        return cls(
            architecture=metadata.get("architecture"),
            num_classes=int(metadata["num_classes"]) if "num_classes" in metadata else None,
            options=dict(json.loads(metadata.get("options", "{}"))),
            normalization=None if mean_std is None else (tuple(mean_std[0]), tuple(mean_std[1])),
            data=DataFacts.from_metadata(metadata),
        )

    def plain(self) -> dict[str, Any]:
        """Name, class count and options, as plain values for JSON."""
        return {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "options": self.options,
        }

    def to_metadata(self) -> dict[str, str]:
        """Text by key; of the network nothing where text cannot rebuild it."""
        metadata = self.data.to_metadata() if self.data else {}
        if self.architecture is None:
            return metadata
        try:
            options = json.dumps(self.options)
        except TypeError:  # an option such as a class
            return metadata
        metadata |= {
            "architecture": self.architecture,
            "num_classes": str(self.num_classes),
            "options": options,
        }
        if self.normalization is not None:
            metadata["normalization"] = json.dumps(self.normalization)
        return metadata


def facts_of(model: nn.Module) -> NetworkFacts:
    """What a network's card says about it; nothing if it has none."""
    card = getattr(model, CARD, None)
    return NetworkFacts() if card is None else card.facts


def describe(model: nn.Module) -> dict[str, str]:
    """Metadata from which `fastkd.models.model_from_file` rebuilds the network.

    Keys: `architecture`, `num_classes`, `options` (JSON), `normalization` (JSON [mean, std]); of
    its data `classes`, `image_size`, `evaluation` and `data` (all JSON, `DataFacts`). Each only if
    it is known; of networks that `create_model` cannot rebuild only those of the data.
    """
    return facts_of(model).to_metadata()
