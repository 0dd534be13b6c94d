"""The first of two stages: the encoder of a network is trained alone, the whole one starts from it.

So Romera et al. 2018 (IEEE T-ITS 19(1)) train ERFNet, and Moonshine (arXiv:1711.02613, section
5.2) its cheap students. Flow: `runs.one_stage` comes here before it builds the training of a
network that has an encoder, and passes in how a recipe is trained in a folder: a finished encoder
is taken as it is, an unfinished one is resumed. Its best epoch is what the whole network starts
from.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fastkd.models.config import StudentConfig
from fastkd.recipe.schema import Recipe

__all__ = ["NOWHERE", "Start", "train_encoder"]


class Start(NamedTuple):
    """From where a network starts."""

    folder: Path | None
    """Run folder of its encoder; None: from what the recipe says."""
    summary: dict[str, Any]
    """Its part of summary.json."""

    def of(self, student: StudentConfig) -> StudentConfig:
        """The recipe's keys for the network, with the encoder as its weights."""
        if self.folder is None:
            return student
        given = {"weights": str(self.folder), "weights_key": None, "new_head": True}
        return student.model_copy(update=given)


NOWHERE = Start(None, {})


def train_encoder(
    recipe: Recipe, folder: Path, train: Callable[[Recipe, Path], dict[str, Any]]
) -> Start:
    """Train the encoder below the folder of the whole network, or take the finished one.

    train: trains a recipe in a folder; its summary.
    """
    lesson = recipe.of_encoder()
    if lesson is None:
        return NOWHERE
    path = folder / "encoder"
    return Start(path, {"encoder": train(lesson, path)})
