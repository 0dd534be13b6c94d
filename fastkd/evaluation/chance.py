"""What guessing reaches: the floor under teachers and students."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Chance", "chance_of", "least_above_chance", "share_of_guessing", "surely_above"]


@dataclass(frozen=True)
class Chance:
    """The validation results of a network that has learned nothing from the images."""

    accuracy: float
    """Of always naming the commonest class."""
    floor: float
    """Above this accuracy it is no coincidence."""
    loss: float
    """Cross entropy of giving every class the same probability."""


def chance_of(labels_N: Tensor, num_classes: int, samples: int) -> Chance:
    """labels_N: class ids of the training images. samples: number of validation images."""
    known_N = labels_N[labels_N >= 0]
    commonest = known_N.bincount().max().item() / len(known_N) if len(known_N) else 0.0
    accuracy = max(commonest, 1 / num_classes)
    return Chance(accuracy, surely_above(accuracy, samples), math.log(num_classes))


def surely_above(chance: float, samples: int) -> float:
    """Two standard deviations above chance, for a share that is measured on so many samples."""
    return chance + 2 * (chance * (1 - chance) / samples) ** 0.5


def share_of_guessing(found: Mapping[str, float], num_classes: int) -> float:
    """The headline metric of an evaluation, had the answers carried no information."""
    return found.get("chance", 1 / num_classes)


def least_above_chance(found: Mapping[str, float], num_classes: int) -> float:
    """The headline metric from which the network of an evaluation is better than guessing."""
    return surely_above(share_of_guessing(found, num_classes), int(found["samples"]))
