"""`fastkd eval`: accuracy of a finished run or of a weight file, on the whole validation set."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.compute.placement import Placement
from fastkd.compute.precision import resolve_precision
from fastkd.compute.ranks import open_world
from fastkd.data import DataPair
from fastkd.errors import UserError
from fastkd.evaluation.evaluate import evaluate
from fastkd.models import count, create_model
from fastkd.models.card import card_of
from fastkd.models.registry import model_from_file
from fastkd.output.call_record import read_call
from fastkd.output.console import Console
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session, open_recipe_data
from fastkd.storage.weight_file import WeightFile
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.teacher import Teacher

__all__ = ["evaluate_model", "evaluate_run"]


def evaluate_run(run: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate the best weights of a run folder, on its own data unless keys name other data."""
    folder = Path(run)
    if not (folder / "config.yaml").exists():
        raise UserError(
            f"{run} is not a run folder (no config.yaml); a network by name needs its weights: "
            f"fastkd eval NAME --weights FILE data.name=... data.root=..."
        )
    weights = folder / "best.safetensors"
    if not weights.exists():
        raise UserError(f"{run} has no best.safetensors yet: it has not been evaluated so far")
    if read_call(folder) is not None:
        model = model_from_file(weights)
        if not _names_data(keys):
            raise UserError(
                f"{run} is a run of fastkd.distill, and its validation images are in the script "
                f"that made it: name images to evaluate on, normalised as that script does it, "
                f"data.name=folder data.root=FOLDER data.image_size=.. data.mean=.. data.std=.."
            )
        card = card_of(model)
        assert card is not None and card.name is not None
        return _evaluate(_recipe_for(card.name, keys), lambda _: model)
    recipe = load_recipe(None, config=folder / "config.yaml", overrides=keys)
    return _evaluate(recipe, lambda _: model_from_file(weights))


def evaluate_model(name: str, weights: str, keys: Sequence[str]) -> dict[str, Any]:
    """Evaluate a network with weights from a file on the data that the keys name.

    Options such as the width come from the file if fastkd wrote it, else from the keys
    (`student.width=0.5`).
    """
    if not _names_data(keys):
        raise UserError(
            "name the data to evaluate on: data.name=cifar10 data.root=FOLDER, or data.name=digits"
        )
    recipe = _recipe_for(name, keys)

    def build(data: DataPair) -> nn.Module:
        if options := recipe.student.options():
            return create_model(name, data.facts.num_classes, weights=weights, **options)
        file = WeightFile.open(weights)
        if file.facts.get("architecture") == name:
            return model_from_file(file)
        return create_model(name, data.facts.num_classes, weights=file)

    return _evaluate(recipe, build)


def _names_data(keys: Sequence[str]) -> bool:
    return any(key.startswith("data.name=") for key in keys)


def _recipe_for(name: str, keys: Sequence[str]) -> Recipe:
    """A recipe that says no more than which network sees which data."""
    blank = {
        "name": "eval",
        "data": {"name": "digits"},
        "student": {"name": name},
        "losses": {"ce": {"weight": 1.0}},
    }
    return load_recipe(None, values=blank, overrides=keys)


def _evaluate(recipe: Recipe, build: Callable[[DataPair], nn.Module]) -> dict[str, Any]:
    # Training images are not used here, so their number must not matter.
    whole = {"drop_last": False, "train_limit": None}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=whole)})
    with open_world(recipe.device) as world:
        data = open_recipe_data(recipe, Session(world, Console(enabled=False), Path("runs")))
        model = build(data)
        card = card_of(model)
        assert card is not None
        if card.num_classes != data.facts.num_classes:
            raise UserError(
                f"the network {card.name} knows {card.num_classes} classes, "
                f"{data.name} has {data.facts.num_classes}: name the data it was trained on"
            )
        precision = resolve_precision(recipe.precision, world.device)
        network = Teacher(
            # data.mean and data.std, if given, are what the network expects.
            LoadedNet(model, None if recipe.data.mean else card.normalization),
            {},
            Placement(world, precision, recipe.channels_last),
            data_normalization=data.facts.normalization,
            # Exactly the number that its training reported.
            fold_batch_norm=False,
        )
        size = count(model, data.facts.image_shape)
        found = evaluate(network.logits, data.val, precision, world, data.facts.multilabel)
    return found | {"params": size.params, "macs": size.macs, "precision": precision.name}
