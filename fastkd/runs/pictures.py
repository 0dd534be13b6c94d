"""predictions.png at the end of a run on labelled pixels: what its saved networks answer.

Flow: `runs.stages` calls this when everything is trained; `report.predictions` draws.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.compute.placement import Placement
from fastkd.data import DataPair
from fastkd.errors import UserError
from fastkd.printable import in_words
from fastkd.recipe.schema import Recipe
from fastkd.report.predictions import Example, draw_predictions
from fastkd.runs.saved_network import SavedNetwork, open_saved, whole_view
from fastkd.storage.weight_file import WeightFile
from fastkd.teachers.ensemble import bind_teacher
from fastkd.teachers.loaded import LoadedNet

__all__ = ["draw_pictures", "palette_of"]

PICTURES = "predictions.png"
_EXAMPLES = 4


def draw_pictures(
    folder: Path,
    recipe: Recipe,
    data: DataPair,
    placement: Placement,
    *,
    alone: Path | None,
    teachers: tuple[LoadedNet, ...],
) -> str:
    """Draw predictions.png of a finished run, some validation images; where it is, or why not.

    alone: the folder of the student alone. teachers: of the run, () if it has none or never loaded
    them.
    """
    try:
        networks = _networks(folder, recipe, data, placement, alone, teachers)
        examples = _examples(data, networks)
    except Exception as error:  # a trained run never fails for its pictures
        return f"no pictures: {error if isinstance(error, UserError) else in_words(error)}"
    source: Any = data.sources[1]
    return draw_predictions(
        folder / PICTURES,
        examples,
        source.classes,
        palette_of(data),
        title=f"{recipe.name}  ({folder.name}), weights of the best epoch",
    )


def palette_of(data: DataPair) -> list[tuple[int, int, int]] | None:
    """The colours of a set's classes by class id; None if it brings none."""
    palette = getattr(data.sources[1], "palette", None)
    return None if palette is None else [(int(r), int(g), int(b)) for r, g, b in palette]


def _networks(
    folder: Path,
    recipe: Recipe,
    data: DataPair,
    placement: Placement,
    alone: Path | None,
    teachers: tuple[LoadedNet, ...],
) -> dict[str, SavedNetwork]:
    found: dict[str, SavedNetwork] = {}
    if alone is not None:
        weights = WeightFile.open(alone / "best.safetensors")
        found["student alone"] = open_saved(weights, recipe, placement)
    if teachers:
        normalization = data.facts.normalization
        bound = bind_teacher(
            teachers, {}, placement, data_normalization=normalization, fold_batch_norm=False
        )
        title = "teacher" if len(teachers) == 1 else "teachers together"
        found[title] = SavedNetwork(bound.logits, whole_view(recipe), normalization, placement)
    weights = WeightFile.open(folder / "best.safetensors")
    own = "student distilled" if recipe.teacher else "student"
    found[own] = open_saved(weights, recipe, placement)
    return found


def _examples(data: DataPair, networks: Mapping[str, SavedNetwork]) -> list[Example]:
    """Validation images, spread evenly; without those that cannot be read, which a run may skip."""
    source: Any = data.sources[1]
    examples: list[Example] = []
    unread: UserError | None = None
    for sample in np.unique(np.linspace(0, len(source) - 1, _EXAMPLES).round().astype(int)):
        try:
            picture, label_HW = source.image(int(sample)), np.asarray(source.label_map(int(sample)))
        except UserError as error:
            unread = error
            continue
        size = label_HW.shape[0], label_HW.shape[1]
        answers = {name: one.label_map(picture, size) for name, one in networks.items()}
        examples.append(Example(picture, label_HW, answers))
    if not examples:
        raise unread or UserError("there is no validation image")
    return examples
