"""`fastkd eval`: the metrics of a finished run or of a weight file, on the whole validation set."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.compute.placement import Placement
from fastkd.compute.ranks import open_world
from fastkd.data import DataPair
from fastkd.data.normalization import PHOTOGRAPHS
from fastkd.errors import UserError
from fastkd.evaluation.confusion import by_class
from fastkd.evaluation.evaluate import evaluate
from fastkd.models import create_model, use_kernels
from fastkd.models.card import card_of, title_of
from fastkd.models.hub import convention
from fastkd.models.registry import model_from_file
from fastkd.output.call_record import read_call
from fastkd.output.console import Console
from fastkd.printable import few, shown
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session, open_recipe_data
from fastkd.storage.facts import DataFacts
from fastkd.storage.weight_file import WeightFile
from fastkd.teachers.class_names import map_by_name, other_order_in_timm
from fastkd.teachers.loaded import LoadedNet, unlearned
from fastkd.teachers.loading import of_images, size
from fastkd.teachers.teacher import Teacher

__all__ = [
    "as_shown",
    "built_for",
    "evaluate_model",
    "evaluate_network",
    "evaluate_run",
    "for_evaluation",
    "names_data",
    "network_on",
    "no_student_keys",
    "recipe_for",
]


def evaluate_run(run: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate the best weights of a run folder, on its own data unless keys name other data."""
    no_student_keys(run, keys, "evaluated")
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
        if not names_data(keys):
            raise UserError(
                f"{run} is a run of fastkd.distill, and its validation images are in the script "
                f"that made it: name images to evaluate on, normalised as that script does it, "
                f"data.name=folder data.root=FOLDER data.image_size=.. data.mean=.. data.std=.."
            )
        card = card_of(model)
        assert card is not None and card.name is not None
        return evaluate_network(recipe_for(card.name, keys), lambda _: model)
    recipe = load_recipe(None, config=folder / "config.yaml", overrides=keys)
    file = WeightFile.open(weights)
    return evaluate_network(as_shown(recipe, file.network.data), lambda _: model_from_file(file))


def evaluate_model(name: str, weights: str, keys: Sequence[str]) -> dict[str, Any]:
    """Evaluate a network with weights from a file on the data that the keys name.

    Options such as the width come from the file if fastkd wrote it, else from the keys
    (`student.width=0.5`). So does the way in which pictures are shown, and for a network of timm
    with a file that does not say it, from timm.
    """
    if not names_data(keys):
        raise UserError(
            "name the data to evaluate on: data.name=cifar10 data.root=FOLDER, or data.name=digits"
        )
    recipe = recipe_for(name, keys, weights)

    file = WeightFile.open(weights, recipe.student.weights_key)
    facts = file.network.data
    of_timm = name.startswith("timm:") and not file.facts.get("architecture")
    if of_timm and recipe.data.name in PHOTOGRAPHS:
        facts = facts or convention(name, recipe.data.image_size)

    def build(data: DataPair) -> nn.Module:
        classes = data.facts.classes or ()
        if of_timm and other_order_in_timm(classes):
            warnings.warn(
                f"class folders such as {few(classes)} are in this order here, timm sorts them by "
                f"number: if timm trained {file}, give the folders names of equal length (01, 02, "
                f"10) in lower case, or the accuracy is wrong",
                stacklevel=1,
            )
        model = built_for(recipe, file, data.facts.num_classes)
        return use_kernels(model, recipe.student.kernels)

    return evaluate_network(as_shown(recipe, facts), build)


def built_for(recipe: Recipe, file: WeightFile, num_classes: int | None) -> nn.Module:
    """The network that recipe keys name, with the weights of a file and what the file says of it.

    num_classes: for a file that does not say it.
    """
    name = recipe.student.name
    if options := recipe.student.options():
        model = create_model(name, num_classes, weights=file, **options)
        card = card_of(model)
        if card and card.unlearned:
            raise UserError(unlearned(card, file, "student", "train it like this first"))
        return model
    if file.network.architecture in (name, f"simkd:{name}"):
        return model_from_file(file)
    return create_model(name, num_classes, weights=file)


def as_shown(recipe: Recipe, facts: DataFacts | None) -> Recipe:
    """The recipe that shows pictures as the network is used to, where no key says otherwise."""
    keys = recipe.data
    # Digits come in one size.
    if facts is None or keys.name == "digits":
        return recipe
    own: dict[str, Any] = {"image_size": facts.image_size}
    if framing := facts.evaluation:
        crop = framing.crop
        if keys.image_size and facts.image_size:
            crop = round(crop * keys.image_size / facts.image_size)
        framing = framing.at(keys.eval_crop or crop)
        own |= {f"eval_{name}": value for name, value in framing.model_dump().items()}
    missing = {key: value for key, value in own.items() if getattr(keys, key) is None}
    return recipe.model_copy(update={"data": keys.model_copy(update=missing)})


def no_student_keys(what: str, keys: Sequence[str], done: str) -> None:
    """UserError for keys of a network that is in a file. done: what is done with it."""
    if named := [key for key in keys if key.startswith(("student.", "student="))]:
        raise UserError(
            f"the network of {what} is in its files, and is {done} as it is: leave out "
            f"{shown(named[0])}"
        )


def names_data(keys: Sequence[str]) -> bool:
    """Whether recipe keys say which images there are."""
    return any(key.startswith("data.name=") for key in keys)


def recipe_for(name: str, keys: Sequence[str], weights: str | None = None) -> Recipe:
    """A recipe that says no more than which network sees which data."""
    blank = {
        "name": "eval",
        "data": {"name": "digits"},
        "student": {"name": name, "weights": weights},
        "losses": {"ce": {"weight": 1.0}},
    }
    return load_recipe(None, values=blank, overrides=keys)


def for_evaluation(recipe: Recipe) -> Recipe:
    """The recipe for its validation images alone: the number of training images does not matter."""
    whole = {"drop_last": False, "train_limit": None}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=whole)})


def network_on(model: nn.Module, data: DataPair, recipe: Recipe, placement: Placement) -> Teacher:
    """A saved network that answers for the validation images of a recipe, in their classes.

    Raises:
        UserError: it knows other classes, or fails on images of this size.
    """
    card = card_of(model)
    assert card is not None
    class_map = map_by_name(
        card.data,
        data.facts.classes,
        network=f"the network {card.name}",
        cure="Name the data it was trained on",
    )
    if class_map is None and card.num_classes != data.facts.num_classes:
        raise UserError(
            f"the network {card.name} knows {card.num_classes} classes, "
            f"{data.name} has {data.facts.num_classes}: name the data it was trained on"
        )
    network = Teacher(
        # data.mean and data.std, if given, are what the network expects.
        LoadedNet(
            model,
            None if recipe.data.mean else card.normalization,
            class_map=class_map,
            name=title_of(model),
            remedy=of_images(data),
        ),
        {},
        placement,
        data_normalization=data.facts.normalization,
        # Exactly the number that its training reported.
        fold_batch_norm=False,
    )
    images_NCHW = torch.zeros(2, *data.facts.image_shape, device=placement.device)
    network.tried(images_NCHW, called="the network")
    return network


def evaluate_network(recipe: Recipe, build: Callable[[DataPair], nn.Module]) -> dict[str, Any]:
    """Metrics of a network on the validation images of a recipe, and its size."""
    recipe = for_evaluation(recipe)
    with open_world(recipe.device) as world:
        session = Session(world, Console(enabled=False), Path("runs"))
        data, placement = open_recipe_data(recipe, session), session.placement(recipe)
        model = build(data)
        network = network_on(model, data, recipe, placement)
        precision = placement.precision
        found = evaluate(network.logits, data.val, precision, world, data.facts.label_kind)
    if "class_iou" in found:
        found["class_iou"] = by_class(found["class_iou"], data.facts.classes)
    found |= {"shown": data.facts.shown, **size(model, data.facts.image_shape)}
    return found | {"precision": precision.name}
