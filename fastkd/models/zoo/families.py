"""The families of the zoo, and which of them a name belongs to.

A network of which a part can be trained first names it in the `ENCODERS` of its family.
"""

import inspect
from types import ModuleType

from fastkd.models.zoo import (
    erfnet,
    mobilenetv2,
    resnet,
    resnet18,
    resnet50,
    shufflenetv1,
    shufflenetv2,
    vgg,
    wrn,
)
from fastkd.models.zoo.encoder import Encoder

__all__ = ["FAMILIES", "encoder_of", "family_of", "options_of"]

FAMILIES: tuple[ModuleType, ...] = (
    resnet,
    resnet18,
    resnet50,
    wrn,
    vgg,
    mobilenetv2,
    shufflenetv1,
    shufflenetv2,
    erfnet,
)
"""Each has NAMES (listed), PATTERN (accepted) and build(name, num_classes, *, options)."""


def family_of(name: str) -> ModuleType | None:
    """The family that builds a network of this name."""
    return next((family for family in FAMILIES if family.PATTERN.fullmatch(name)), None)


def options_of(family: ModuleType) -> list[str]:
    """The options that its `build` takes."""
    parameters = inspect.signature(family.build).parameters.values()
    return [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]


def encoder_of(name: str) -> Encoder | None:
    """The encoder of a network, which can be trained first; None if it has none by itself."""
    return getattr(family_of(name), "ENCODERS", {}).get(name)
