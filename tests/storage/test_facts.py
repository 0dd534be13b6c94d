"""Facts of the data: the same wherever they are written, validated when read, compared in words."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastkd.data.config import DataConfig
from fastkd.data.loaders.open import data_facts
from fastkd.data.sources.cifar import LAYOUTS
from fastkd.errors import UserError
from fastkd.models import create_model
from fastkd.models.card import card_of
from fastkd.models.registry import model_from_file
from fastkd.storage.description import NetworkFacts
from fastkd.storage.facts import DataFacts, Framing, Listing
from fastkd.storage.weights import load_weights, save_weights

LISTING = Listing(counts=(2, 3), files="ab", contents="cd", read=5, times="ef")
FACTS = DataFacts(
    name="folder",
    classes=('Ω, "x"', "b c"),
    image_size=32,
    evaluation=Framing(resize=37, crop=32, interpolation="bicubic", mode="squash"),
    normalization=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    train=LISTING,
    val=LISTING.model_copy(update={"counts": (1, 1)}),
)


def test_metadata_and_json_hold_all_of_it(tmp_path: Path) -> None:
    assert DataFacts.from_metadata(FACTS.to_metadata()) == FACTS
    assert DataFacts.read(json.loads(json.dumps(FACTS.plain()))) == FACTS
    assert DataFacts.from_metadata({"format": "pt"}) is None
    path = tmp_path / "a.safetensors"
    save_weights(path, create_model("resnet8", 2, width=0.25), FACTS.to_metadata())
    assert json.loads(load_weights(path)[1]["classes"]) == list(FACTS.classes or ())
    rebuilt = model_from_file(path)
    card = card_of(rebuilt)
    assert card is not None and card.data == FACTS
    # Whoever saves it elsewhere keeps them; another classifier has no names.
    save_weights(tmp_path / "b.safetensors", rebuilt)
    assert DataFacts.from_metadata(load_weights(tmp_path / "b.safetensors")[1]) == FACTS
    other = card_of(create_model("resnet8", 5, width=0.25, weights=path, new_head=True))
    assert other is not None and other.data == FACTS.model_copy(update={"classes": None})


@pytest.mark.parametrize(
    "entry",
    [
        {"classes": '["a", "a"]'},
        {"classes": "[]"},
        {"classes": '"cat"'},
        {"classes": "[1, 2"},
        {"image_size": "0"},
        {"image_size": "1e300"},
        {"image_size": "[32]"},
        {"evaluation": '{"resize": 10, "crop": 12}'},
        {"evaluation": '{"resize": 10, "crop": 8, "interpolation": "exec"}'},
        {"evaluation": "3"},
        {"data": "[]"},
        {"data": "[" * 100_000},
        {"image_size": "9" * 5000},
        {"data": '{"train": {"counts": "many"}}'},
        {"normalization": "[[0, 0, 0], [1, 0, 1]]", "image_size": "3"},
        {"normalization": "[[0, 0, NaN], [1, 1, 1]]", "image_size": "3"},
    ],
    ids=str,
)
def test_what_a_stranger_wrote_is_validated(tmp_path: Path, entry: dict[str, str]) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(path, create_model("resnet8", 2, width=0.25), entry)
    with pytest.raises(UserError, match=r"a\.safetensors: its metadata cannot be read") as caught:
        model_from_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("deviations", [[1e-300, 1, 1], [1, 2e4, 1], [0, 1, 1], [1, 1]], ids=str)
def test_one_rule_for_the_normalisation_of_facts_weight_files_and_recipes(
    deviations: list[float],
) -> None:
    with pytest.raises(ValueError, match="normalization"):
        DataFacts.read({"normalization": [[0, 0, 0], deviations]})
    with pytest.raises(ValueError, match="normalization"):
        NetworkFacts.from_metadata({"normalization": json.dumps([[0, 0, 0], deviations])})
    with pytest.raises(ValueError, match="std"):
        DataConfig.model_validate({"name": "digits", "mean": (0, 0, 0), "std": deviations})


@pytest.mark.parametrize("key", ["image_size", "data", "evaluation", "classes", "options"])
def test_a_number_of_5000_digits_is_called_that(tmp_path: Path, key: str) -> None:
    path = tmp_path / "a.safetensors"
    named = create_model("resnet8", 2, width=0.25)
    save_weights(path, named, {"architecture": "resnet8", key: "9" * 5000})
    with pytest.raises(UserError, match=rf"cannot be read \({key}: a number of 5,000 digits\)"):
        model_from_file(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """ROOT/train and ROOT/val, 3 classes of 3 pictures, uncompressed: all files have one size."""
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee", "cow")):
            place = tmp_path / "set" / split / name
            place.mkdir(parents=True)
            for number in range(3):
                colour = (80 * label, 60 * number, 200 if split == "train" else 100)
                Image.new("RGB", (10, 8), colour).save(place / f"{number}.bmp")
    return tmp_path / "set"


def facts_of(root: Path, **keys: Any) -> DataFacts:
    keys = {"name": "folder", "root": str(root), "image_size": 8} | keys
    return data_facts(DataConfig.model_validate(keys))


def _swap(root: Path) -> None:
    one, two = root / "train/ant/0.bmp", root / "train/ant/1.bmp"
    times = [file.stat().st_mtime_ns for file in (one, two)]
    one.rename(root / "kept")
    two.rename(one)
    (root / "kept").rename(two)
    for file, time in zip((one, two), times, strict=True):
        os.utime(file, ns=(time, time))


def _replace(root: Path, place: str, size: tuple[int, int] = (10, 8)) -> None:
    time = (root / place).stat().st_mtime_ns
    Image.new("RGB", size, (7, 7, 7)).save(root / place)
    os.utime(root / place, ns=(time, time))


def _rename_class(root: Path, old: str, new: str) -> None:
    for split in ("train", "val"):
        (root / split / old).rename(root / split / new)


def _move(root: Path) -> None:
    (root / "train/ant/0.bmp").rename(root / "train/bee/9.bmp")


CHANGES: dict[str, tuple[Callable[[Path], Any], list[str], list[str]]] = {
    "two pictures swapped, times and all": (
        _swap,
        ["other pictures in train under the same names"],
        [],
    ),
    "a picture of the same size, name and time": (
        lambda root: _replace(root, "train/cow/2.bmp"),
        ["other pictures in train under the same names"],
        [],
    ),
    "a larger picture": (
        lambda root: _replace(root, "train/cow/2.bmp", (10, 9)),
        ["other files in train, by their names, sizes or labels"],
        [],
    ),
    "one in validation alone": (
        lambda root: _replace(root, "val/bee/1.bmp"),
        [],
        ["other pictures in val under the same names"],
    ),
    "removed": (
        lambda root: (root / "train/ant/0.bmp").unlink(),
        ["8 images in train, 9 before"],
        [],
    ),
    "moved to another class": (
        _move,
        ["images in train moved between classes (ant 2, before 3, bee 4, before 3)"],
        [],
    ),
    "a class renamed": (
        lambda root: _rename_class(root, "bee", "wasp"),
        [
            "new class wasp",
            "missing class bee",
            "other files in train, by their names, sizes or labels",
        ],
        ["other files in val, by their names, sizes or labels"],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_of_the_images_is_noticed(folder: Path, name: str) -> None:
    change, training, evaluation = CHANGES[name]
    before = facts_of(folder)
    change(folder)
    now = facts_of(folder)
    assert before.training_changes(now) == training
    assert before.evaluation_changes(now) == evaluation
    assert (before.fingerprint(evaluation=False) == now.fingerprint(evaluation=False)) == (
        not training
    )
    assert before.fingerprint(evaluation=True) != now.fingerprint(evaluation=True)


def test_other_keys_are_other_facts(folder: Path) -> None:
    before = facts_of(folder)
    assert before.evaluation == Framing(resize=9, crop=8)
    rule = facts_of(folder, eval_resize=8)
    assert (before.training_changes(rule), before.evaluation_changes(rule)) == (
        [],
        [
            "evaluation by short side to 8 (bilinear), central 8, before by short side to 9 "
            "(bilinear), central 8"
        ],
    )
    assert before.training_changes(facts_of(folder, image_size=7)) == [
        "images of 7 pixels, 8 before"
    ]
    assert before.training_changes(facts_of(folder, train_limit=6)) == [
        "6 images in train, 9 before"
    ]
    assert before.training_changes(
        before.model_copy(update={"classes": ("bee", "ant", "cow")})
    ) == ["the classes have another order"]


def test_a_copy_and_a_touched_file_are_the_same_data(folder: Path, tmp_path: Path) -> None:
    before = facts_of(folder)
    for file in folder.rglob("*.bmp"):
        os.utime(file, ns=(0, 0))
    folder.rename(tmp_path / "elsewhere")
    now = facts_of(tmp_path / "elsewhere")
    assert before.changes(now) == [] and before.touched(now) == []
    assert before.fingerprint(evaluation=True) == now.fingerprint(evaluation=True)
    assert before.train is not None and now.train is not None
    assert before.train.times != now.train.times


def test_of_a_large_set_a_sample_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.data.sources.listing.READ_FILES", 3)
    before = facts_of(folder)
    assert before.train is not None and before.train.read == 3
    # The first, middle and last of nine.
    _replace(folder, "train/bee/1.bmp")
    assert before.training_changes(facts_of(folder)) != []
    unread = folder / "val/ant/1.bmp"
    os.utime(unread, ns=(0, 0))
    now = facts_of(folder)
    assert before.evaluation_changes(now) == [] and before.touched(now) == ["val"]
    _replace(folder, "val/ant/1.bmp", (12, 8))
    assert before.evaluation_changes(facts_of(folder)) != []


def test_sets_in_memory_are_compared_by_pixels_and_labels(tmp_path: Path) -> None:
    assert data_facts(DataConfig(name="digits")) == data_facts(DataConfig(name="digits"))
    layout = LAYOUTS["cifar10"]
    (tmp_path / layout.binary_dir).mkdir()
    content = bytearray()
    for number in range(20):
        content += bytes([number % 10]) + bytes([number]) * 3072
    for name in (*layout.binary_train, *layout.binary_val):
        (tmp_path / layout.binary_dir / name).write_bytes(content)
    keys = DataConfig(name="cifar10", root=str(tmp_path))
    before = data_facts(keys)
    assert before.named is None and before.classes == tuple("0123456789")
    first = tmp_path / layout.binary_dir / layout.binary_train[0]
    content[5] ^= 1
    first.write_bytes(content)
    assert before.training_changes(data_facts(keys)) == [
        "other pictures in train under the same names"
    ]
    assert before.evaluation_changes(data_facts(keys)) == []
