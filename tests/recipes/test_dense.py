"""Recipes for label maps, each in a few steps on real images of CamVid, in the layout it asks for.

What Cityscapes' recipes see are CamVid's images under the names of Cityscapes' release, with the
numbers that its label maps have.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastkd.data.sources.segmentation import CITYSCAPES
from fastkd.recipes.catalogue import all_recipes, find_entry
from fastkd.recipes.loading import build
from fastkd.recipes.missing import missing
from fastkd.training.schedules import Schedule

DATA = os.environ.get("FASTKD_TEST_DATA")
DENSE = [name for name in all_recipes() if name.startswith(("camvid/", "moonshine/cityscapes/"))]
QUICK = ("data.image_size=64", "epochs=1", "precision=fp32", "compile=off", "device=cpu")
NUMBERS = {"train": 8, "val": 3}
# Of CamVid's classes in the order of their ids: sky, building, pole, road, ..
AS_CITYSCAPES = np.array([23, 11, 17, 7, 8, 21, 20, 13, 26, 24, 33, 3], dtype=np.uint8)

needs_camvid = pytest.mark.skipif(
    not DATA or not (Path(DATA) / "camvid").is_dir(),
    reason="FASTKD_TEST_DATA has no camvid/ (folder with train/, val/)",
)


def pairs_of(split: str) -> list[tuple[Path, Path]]:
    """The first images of a split with their label maps."""
    folder = Path(str(DATA)) / "camvid" / split
    images = sorted((folder / "images").iterdir())[: NUMBERS[split]]
    return [(image, folder / "labels" / f"{image.stem}.png") for image in images]


def write_camvid(root: Path) -> None:
    for split in NUMBERS:
        for image, label in pairs_of(split):
            for kind, file in (("images", image), ("labels", label)):
                target = root / split / kind
                target.mkdir(parents=True, exist_ok=True)
                (target / file.name).symlink_to(file)


def write_cityscapes(root: Path) -> None:
    for split in NUMBERS:
        for number, (image, label) in enumerate(pairs_of(split)):
            stem = f"cambridge_{number:06}_000019"
            left, fine = (root / kind / split / "cambridge" for kind in ("leftImg8bit", "gtFine"))
            left.mkdir(parents=True, exist_ok=True)
            fine.mkdir(parents=True, exist_ok=True)
            Image.open(image).save(left / f"{stem}_leftImg8bit.png")
            ids_HW = AS_CITYSCAPES[np.asarray(Image.open(label))]
            Image.fromarray(ids_HW).save(fine / f"{stem}_gtFine_labelIds.png")


# One of each kind by default.
SOME = ("camvid/erfnet--erfnet-G:N/at+kd", "moonshine/cityscapes/erfnet--erfnet-G:N/at")


@needs_camvid
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SOME else pytest.mark.matrix) for name in DENSE],
)
def test_a_recipe_runs_on_real_images(
    command: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    entry = find_entry(name)
    if lacks := missing(entry):
        pytest.skip(f"needs {', '.join(lacks)}")
    (write_camvid if name.startswith("camvid/") else write_cityscapes)(tmp_path / "data")
    taught = ["teacher.min_accuracy=0"] if "teacher.name" in entry.keys else []
    said = command("train", name, "data.root=data", *QUICK, *taught, "out=run")
    assert said.code == 0, said.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    first = summary["history"][0]
    assert 0 <= first["val_miou"] <= 1
    parts = {key.split(".")[1] for key in entry.keys if key.startswith("losses.")}
    assert {f"train_{part}" for part in parts} <= first.keys()
    assert ("encoder" in summary) == name.startswith("moonshine/")
    if "encoder" in summary:
        assert summary["encoder"]["student"] == "erfnet_encoder"
        assert np.isfinite(summary["encoder"]["history"][0]["train_loss"])


def test_the_layout_has_ids_that_are_evaluated() -> None:
    classes = np.frombuffer(CITYSCAPES.ids.table, np.uint8)[AS_CITYSCAPES]
    assert (classes[:-1] < 19).all() and classes[-1] == 255


@pytest.mark.parametrize("name", DENSE)
def test_rates_fall_as_in_erfnet(name: str) -> None:
    entry = find_entry(name)
    if lacks := missing(entry):
        pytest.skip(f"needs {', '.join(lacks)}")
    recipe = build(entry)
    for one in filter(None, (recipe, recipe.of_encoder())):
        epochs = one.total_epochs
        schedule = Schedule.from_config(one.scaled_optim(), epochs=epochs, steps_per_epoch=7)
        assert (one.optim.name, one.optim.lr, one.optim.weight_decay) == ("adam", 5e-4, 1e-4)
        for epoch in range(1, epochs + 1):
            factor = schedule.lr_factor(7 * (epoch - 1))
            assert factor == pytest.approx((1 - (epoch - 1) / epochs) ** 0.9, rel=1e-12)
