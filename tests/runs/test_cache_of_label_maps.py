"""Which keys of label maps a cache of answers belongs to."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data import open_data
from fastkd.recipes.loading import load_recipe
from fastkd.runs.teacher_cache import _of_images
from fastkd.testing.label_maps import write_pairs


@pytest.fixture
def streets(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "streets", 4, 2)


def seen(root: Path, *words: str) -> dict[str, object]:
    overrides = ["data.name=pairs", f"data.root={root}", "batch_size=2", *words]
    recipe = load_recipe("quickstart", overrides=overrides)
    world = World(0, 0, 1, torch.device("cpu"), None)
    placement = Placement(world, Precision("fp32", "cpu"))
    data = open_data(recipe.data, recipe.augment, batch_size=2, seed=0, placement=placement)
    return _of_images(recipe, data)


@pytest.mark.parametrize(
    "word",
    [
        "data.multiple=16",
        "data.image_size=8",
        "augment.window=8,8",
        "augment.scale=0.5,2",
        "augment.crop=pad",
        "data.backend=torch",
    ],
)
def test_what_changes_images_makes_other_answers(streets, word):
    assert seen(streets) != seen(streets, word)


def test_what_changes_a_label_map_makes_other_answers(streets):
    before = seen(streets)
    Image.fromarray(np.ones((16, 24), np.uint8)).save(streets / "labels" / "train" / "000.png")
    assert seen(streets) != before


def test_workers_change_none(streets):
    assert seen(streets) == seen(streets, "data.workers=0")


def test_keys_that_are_not_set_are_those_of_older_caches(streets):
    assert not {"augment.scale", "augment.window"} & seen(streets).keys()
    assert seen(streets)["data.backend"].startswith("resident (pillow ")
