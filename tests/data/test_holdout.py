"""Validation images held back from a folder that has none, and what is said of a data set."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data import DataPair, FolderIndex, open_data, open_source
from fastkd.data.config import AppearanceConfig, DataConfig
from fastkd.data.sources.holdout import Holdout
from fastkd.errors import UserError

SIZES = {"ant": 1, "bee": 2, "cow": 7, "dog": 40}


@pytest.fixture
def photos(tmp_path) -> Path:
    """Class folders at the top: 1, 2, 7 and 40 images whose grey level is their number."""
    for name, size in SIZES.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(size):
            path = tmp_path / "photos" / name / f"{number:02d}.png"
            Image.new("L", (8, 8), number).save(path)
    return tmp_path / "photos"


def opened(root: Path, rank: int = 0, world_size: int = 1, seed: int = 0, **keys) -> DataPair:
    world = World(rank, rank, world_size, torch.device("cpu"), None)
    return open_data(
        DataConfig(name="folder", root=str(root), **keys),
        AppearanceConfig(crop="none", flip=False),
        batch_size=4,
        seed=seed,
        placement=Placement(world, Precision("fp32", "cpu")),
    )


def files(root: Path, split: str, **keys) -> set[str]:
    index = open_source("folder", root, split, holdout=Holdout(**keys))
    assert isinstance(index, FolderIndex)
    return {str(Path(index.path(n)).relative_to(root)) for n in range(len(index))}


@pytest.mark.parametrize("flat", [True, False], ids=["classes at the top", "only train"])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.99])
def test_the_split_is_disjoint_whole_and_stratified(photos, tmp_path, share, flat):
    if not flat:
        (tmp_path / "set").mkdir()
        photos.rename(tmp_path / "set" / "train")
        photos = tmp_path / "set"
    parts = [files(photos, split, share=share) for split in ("train", "val")]
    assert not parts[0] & parts[1]
    everything = {str(path.relative_to(photos)) for path in photos.rglob("*.png")}
    assert parts[0] | parts[1] == everything
    for name, size in SIZES.items():
        held = sum(Path(file).parent.name == name for file in parts[1])
        if size == 1:
            assert held == 0
        else:
            assert 1 <= held <= size - 1
            assert held in (1, size - 1) or abs(held - share * size) <= 0.5


def test_one_seed_gives_one_split_and_others_give_others(photos):
    first = files(photos, "val", share=0.25, seed=3)
    assert first == files(photos, "val", share=0.25, seed=3)
    assert len({frozenset(files(photos, "val", share=0.25, seed=seed)) for seed in range(5)}) == 5


def test_it_is_chosen_from_all_over_a_class_and_not_in_order(photos):
    chosen = [
        int(Path(file).stem)
        for seed in range(50)
        for file in files(photos, "val", share=0.25, seed=seed)
        if file.startswith("dog")
    ]
    assert len(chosen) == 50 * 10
    counts = np.bincount(chosen, minlength=40)
    # binomial: 50 draws of 1 in 4, mean 12.5, deviation 3.1
    assert counts.min() >= 2 and counts.max() <= 24


def test_another_place_and_other_files_do_not_change_it(photos, tmp_path):
    before = files(photos, "val", share=0.25)
    photos.rename(tmp_path / "moved")
    assert files(tmp_path / "moved", "val", share=0.25) == before
    (tmp_path / "moved" / "dog" / "notes.txt").write_text("x")
    Image.new("L", (8, 8)).save(tmp_path / "moved" / "dog" / "99.png")
    after = files(tmp_path / "moved", "val", share=0.25)
    assert len(before ^ after) <= 2  # 99 may have taken the place of one


@pytest.mark.parametrize("backend", ["resident", "torch"])
def test_loaders_of_all_ranks_and_seeds_share_it(photos, backend):
    shown: set[frozenset[tuple[int, int]]] = set()
    for seed in (0, 1):
        seen = []
        for rank in (0, 1):
            keys = {"val_share": 0.25, "backend": backend, "workers": 0}
            pair = opened(photos, rank, 2, seed, **keys, mean=(0.0,) * 3, std=(1.0,) * 3)
            for batch in pair.val.epoch(0):
                levels = (batch.images_NCHW[:, 0, 0, 0] * 255).round().int().tolist()
                seen += zip(batch.labels_N.tolist(), levels, strict=True)
        assert len(seen) == 1 + 2 + 10
        shown.add(frozenset(seen))
    assert len(shown) == 1
    names = sorted(SIZES)
    held = files(photos, "val", share=0.25)
    expected = {(names.index(file[:3]), int(file[4:6])) for file in held}
    assert shown == {frozenset(expected)}


def test_a_limit_takes_training_images_only(photos):
    pair = opened(photos, val_share=0.25, train_limit=8)
    assert (pair.train.num_samples, pair.val.num_samples) == (8, 13)


def shown_in(pair: DataPair, split: str) -> set[tuple[int, int]]:
    """Class and grey level of every image."""
    seen = set()
    for batch in (pair.train if split == "train" else pair.val).epoch(0):
        levels = (batch.images_NCHW[:, 0, 0, 0] * 255).round().int().tolist()
        seen |= set(zip(batch.labels_N.tolist(), levels, strict=True))
    return seen


@pytest.mark.parametrize("backend", ["resident", "torch"])
def test_images_for_tuning_are_of_the_training_images(photos, backend):
    keys = {"val_share": 0.25, "backend": backend, "workers": 0, "drop_last": False}
    plain = opened(photos, **keys, mean=(0.0,) * 3, std=(1.0,) * 3)
    tuned = opened(photos, **keys, mean=(0.0,) * 3, std=(1.0,) * 3, tune_share=0.2)
    left, held = shown_in(tuned, "train"), shown_in(tuned, "val")
    assert not left & held
    assert left | held == shown_in(plain, "train")
    assert not held & shown_in(plain, "val")
    # 1, 1, 5 and 30 images were left for training.
    assert len(held) == 0 + 0 + 1 + 6
    assert tuned.facts.labels_N.shape == (30,)
    assert tuned.remembered.train != plain.remembered.train
    assert "7 of the 37 training images take the place of" in " ".join(tuned.remarks)


def test_images_for_tuning_of_a_set_in_memory():
    keys = {"image_size": None, "name": "digits"}
    pairs = [
        open_data(
            DataConfig(**keys, **more),
            AppearanceConfig(crop="none", flip=False),
            batch_size=10,
            seed=0,
            placement=Placement(
                World(0, 0, 1, torch.device("cpu"), None), Precision("fp32", "cpu")
            ),
        )
        for more in ({}, {"tune_share": 0.25})
    ]
    plain, tuned = (len(pair.facts.labels_N) for pair in pairs)
    assert tuned + pairs[1].val.num_samples == plain
    assert abs(tuned - 0.75 * plain) <= 5
    assert sorted(set(pairs[1].val_labels_N.tolist())) == list(range(10))


def test_images_for_tuning_need_two_of_a_class(tmp_path):
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
    with pytest.raises(
        UserError, match=r"data\.tune_share=0\.1: every class of folder/train has one"
    ):
        opened(tmp_path, tune_share=0.1)


def test_what_there_is_is_said(photos):
    (photos / "dog" / "notes.txt").write_text("x")
    for backend in ("resident", "torch"):
        remarks = opened(photos, val_share=0.25, backend=backend, workers=0).remarks
        assert remarks == (
            "37 training and 13 validation images of 4 classes, 8x8 pixels, "
            f"data.backend={backend}",
            "folder/train leaves out 1 file without an image extension (.txt 1)",
            f"13 of the 50 images in {photos} are held back for validation "
            "(data.val_share=0.25 data.val_seed=0)",
            "1 class of one image has none in the validation images",
        )


@pytest.mark.parametrize("val", ["val", "test"])
def test_a_folder_with_validation_images_uses_them(make_folder, val):
    root = make_folder(val=val)
    pair = opened(root, val_share=0.5)
    assert (pair.train.num_samples, pair.val.num_samples) == (12, 12)
    assert f"data.val_share is not used, {root / val} has the validation images" in pair.remarks


def test_without_the_key_the_message_names_it(photos, make_folder):
    with pytest.raises(
        UserError, match=r"neither train/ nor val/.*has ant, bee.*data\.val_share=0\.1"
    ):
        opened(photos)
    root = make_folder()
    (root / "val").rename(root / "valid")
    with pytest.raises(
        UserError, match=r"has train/ but no val/ or test/\. Add one, or set data\.val_share=0\.1"
    ):
        opened(root)
    (root / "train").rename(root / "val")
    with pytest.raises(UserError, match="has val/ but no train/"):
        opened(root, val_share=0.1)


def test_classes_of_one_image_each_cannot_be_split(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
    with pytest.raises(UserError, match=r"data\.val_share=0\.1: every class of .* has one image"):
        opened(tmp_path, val_share=0.1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "digits", "val_share": 0.1}, "data.val_share=0.1 is for data.name=folder"),
        ({"name": "cifar10", "val_share": 0.1}, "data.val_share=0.1 is for data.name=folder"),
        ({"name": "folder", "val_share": 0.0}, "greater than 0"),
        ({"name": "camvid", "tune_share": 0.1}, "data.tune_share=0.1 takes a share of every class"),
        ({"name": "folder", "val_share": 1.0}, "less than 1"),
        ({"name": "synthetic", "exif": "apply"}, "data.exif, data.alpha and data.white are for"),
        ({"name": "digits", "white": 4095}, "data.exif, data.alpha and data.white are for"),
        ({"name": "folder", "white": 0}, "greater than 0"),
        ({"name": "folder", "max_pixels": 0}, "greater than 0"),
    ],
)
def test_keys_that_would_not_be_read_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**keys)


def test_older_recipes_keep_their_digest():
    plain = DataConfig(name="folder", root="x").outcome()
    assert not {"val_share", "val_seed", "exif", "alpha", "white", "max_pixels"} & set(plain)
    changed = DataConfig(name="folder", root="x", val_share=0.1, alpha="white", max_pixels=1)
    assert set(changed.outcome()) - set(plain) == {"val_share", "alpha"}


def stored_turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(path, exif=exif)


def see_through(path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 9)).save(path)


def twelve_bits(path: Path) -> None:
    Image.fromarray(np.full((8, 8), 4095, dtype=np.uint16)).save(path)


@pytest.mark.parametrize(
    ("draw", "keys", "remark"),
    [
        (stored_turned, {"exif": "apply"}, "12 of 12 images looked at in folder/train are stored"),
        (see_through, {"alpha": "white"}, "12 of 12 images looked at in folder/val have transpar"),
        (twelve_bits, {"white": 4095}, "brighter than 4095 of 65535, so all are nearly black"),
    ],
)
def test_what_a_key_would_show_differently_is_said_once(make_folder, draw, keys, remark):
    root = make_folder(size=(8, 8))
    for file in root.rglob("*.png"):
        draw(file)
    key, value = next(iter(keys.items()))
    remarks = "\n".join(opened(root).remarks)
    assert remark in remarks and f"data.{key}={value}" in remarks
    assert len(opened(root, **keys).remarks) == 1


def test_opaque_upright_eight_bit_images_and_broken_ones_need_no_words(make_folder):
    root = make_folder(size=(8, 8))
    Image.new("RGBA", (8, 8), (1, 2, 3, 255)).save(root / "train" / "ant" / "000.png")
    Image.fromarray(np.full((8, 8), 60000, dtype=np.uint16)).save(
        root / "train" / "bee" / "000.png"
    )
    (root / "train" / "cow" / "000.png").write_bytes(b"broken")
    assert len(opened(root).remarks) == 1


TRAIN = [
    "train",
    "quickstart",
    "data.name=folder",
    "teacher=null",
    "losses.kd=null",
    "losses.ce.weight=1",
    "baseline.lrs=",
    "epochs=1",
    "batch_size=8",
    "compile=off",
    "data.workers=0",
    "augment.padding=1",
]


@pytest.mark.parametrize("backend", ["resident", "torch"])
def test_a_run_counts_its_images_and_an_evaluation_sees_the_same(
    command, photos, tmp_path, backend
):
    said = command(
        *TRAIN, f"data.root={photos}", "data.val_share=0.25", f"data.backend={backend}", "out=run"
    )
    assert said.code == 0, said.err
    assert "37 training and 13 validation images of 4 classes, 8x8 pixels" in said.out
    again = command("eval", str(tmp_path / "run"))
    assert again.code == 0 and "13" in again.out


@pytest.mark.parametrize("keys", [[], ["data.val_share=2"]], ids=["without", "too much"])
def test_a_run_without_validation_images_is_refused_in_a_sentence(command, photos, keys):
    said = command(*TRAIN, f"data.root={photos}", *keys)
    assert said.code == 2
    assert "data.val_share" in said.err and "Traceback" not in said.err
