"""Every runnable recipe's losses accept its networks, as a run asks before it trains a teacher."""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch

from fastkd.data.normalization import LABEL_MAPS
from fastkd.data.sources.segmentation import CITYSCAPES
from fastkd.errors import UserError
from fastkd.losses.base.needs import MEAN_LOGITS
from fastkd.losses.base.registry import build_terms
from fastkd.losses.base.term import BindContext
from fastkd.models import create_model
from fastkd.models.config import StudentConfig
from fastkd.models.taps import Tapped
from fastkd.recipe.schema import Recipe
from fastkd.recipes.catalogue import all_recipes
from fastkd.recipes.loading import build
from fastkd.recipes.missing import missing
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.parts import copy_of_head, last_norm, taps_into_head

SIDES = {"digits": 16, "folder": 64}


@cache
def network(name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    return create_model(name, 10, **dict(options)).eval().requires_grad_(False)


@cache
def shapes_of(
    name: str, options: tuple[tuple[str, Any], ...], side: int, taps: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    """Of these taps, without the batch axis."""
    tapped = Tapped(network(name, options), taps)
    found = tapped(torch.zeros(1, 3, side, side))
    tapped.remove()
    return {tap: tuple(tensor.shape[1:]) for tap, tensor in found.items()}


def shape(tap: str, net: StudentConfig, side: int, logits: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tap; all taps of a network of the zoo come from one pass."""
    if tap in ("logits", MEAN_LOGITS):
        return logits
    key = (net.name, tuple(net.options().items()))
    every = getattr(network(*key), "tap_names", ())
    return shapes_of(*key, side, every if tap in every else (tap,))[tap]


def kinds(every: int) -> Iterator[tuple[str, Recipe]]:
    """One recipe for each pair of architectures and losses; every N-th of them, with every=N.

    Blocks and dropout leave the shapes of the taps as they are (tests/models), and the number of
    classes that of all but the logits.
    """
    seen = set()
    for name, entry in all_recipes().items():
        if "teacher.name" not in entry.keys or missing(entry):
            continue
        decides = ("student.", "teacher.", "losses.", "data.name", "data.image_size")
        aside = (".block", ".dropout", ".weight", ".lr", ".epochs")
        kind = [
            f"{key}={value}"
            for key, value in entry.keys.items()
            if key.startswith(decides) and not key.endswith(aside)
        ]
        if (text := " ".join(sorted(kind))) not in seen:
            seen.add(text)
            if len(seen) % every:
                continue
            recipe = build(entry)
            yield name, recipe
            if (encoder := recipe.of_encoder()) is not None:
                yield encoder.name, encoder


def refused(recipe: Recipe) -> str:
    """What a loss says against these networks; empty where all fit."""
    teacher = recipe.teacher
    assert teacher is not None
    side = SIDES.get(recipe.data.name, 32)
    # Some recipes list a weight for each of them.
    classes = len(CITYSCAPES.names) if recipe.data.name == "cityscapes" else 10
    logits = (classes, side, side) if recipe.data.name in LABEL_MAPS else (classes,)
    nets = {"student": recipe.student, "teacher": teacher}
    for term in build_terms(recipe.losses):
        inner: dict[str, Any] = {}
        try:
            shapes = {
                need: (10,)
                if need.net == "mixed"
                else shape(need.tap, nets[need.net], side, logits)
                for need in term.needs
            }
            if term.name in ("simkd", "jointrd"):
                model = network(teacher.name, tuple(teacher.options().items()))
                inner = {
                    "teacher_stages": model.forward_from,
                    "teacher_head": copy_of_head(model, None, torch.device("cpu")),
                    "teacher_norm": last_norm(model),
                    "teacher_pooled": partial(
                        taps_into_head, LoadedNet(model), (3, side, side), torch.device("cpu")
                    ),
                }
            labels_N = torch.arange(20_000) % classes
            term.bind(
                BindContext(
                    num_samples=len(labels_N),
                    num_classes=classes,
                    train_labels_N=labels_N,
                    shapes=shapes,
                    **inner,
                )
            )
        except UserError as error:
            return f"losses.{term.name}: {error}"
    return ""


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.matrix)])
def test_every_loss_of_every_runnable_recipe_accepts_its_networks(every: int) -> None:
    found = {name: refused(recipe) for name, recipe in kinds(every)}
    assert len(found) > 200 // every
    assert {name: said for name, said in found.items() if said} == {}


@pytest.mark.parametrize("pair", ["wrn_40_2--wrn_16_2", "wrn_40_2--shufflenetv1"])
def test_the_raw_sum_of_a_wide_resnet_is_seen_here(pair: str) -> None:
    recipe = build(all_recipes()[f"cifar100/{pair}/simkd"])
    raw = recipe.losses["simkd"].model_copy(update={"teacher": "stage3"})
    assert "set losses.simkd.teacher=stage3:preact" in refused(
        recipe.model_copy(update={"losses": {"simkd": raw}})
    )
    assert refused(recipe) == ""
