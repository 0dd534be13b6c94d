"""`fastkd data check`: what a folder holds that a run would stumble over."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastkd.data.sources.checking import IMBALANCE


def picture(file: Path, number: int, size: tuple[int, int] = (20, 16)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, four images each in train and two in val."""
    number = 0
    for split, images in (("train", 4), ("val", 2)):
        for name in ("ant", "bee"):
            for _ in range(images):
                number += 1
                picture(tmp_path / "set" / split / name / f"{number}.png", number)
    return tmp_path / "set"


def test_a_sound_folder(root: Path, command) -> None:
    said = command("data", "check", str(root))
    assert said.code == 0
    lines = said.out.splitlines()
    assert lines[0] == "folder/train: 8 images of 2 classes"
    assert "4 to 4 images a class" in lines[1]
    assert "20x16 pixels at the median, the short side from 16 to 16" in said.out
    assert lines[-1] == "every file is read"


def test_every_kind_of_bad_file_is_named_with_its_reason(root: Path, command) -> None:
    folder = root / "train" / "ant"
    (folder / "empty.jpg").touch()
    (folder / "words.png").write_text("no image")
    jpeg = folder / "cut.jpg"
    picture(jpeg, 99, (48, 48))
    jpeg.write_bytes(jpeg.read_bytes()[:1000])
    Image.fromarray(np.zeros((9, 9), np.float32)).save(folder / "float.tif")
    picture(folder / "huge.png", 98, (50, 50))
    said = command("data", "check", str(root), "data.max_pixels=2400", "--json")
    assert said.code == 1
    found = json.loads(said.out)
    bad = {one["file"]: one["reason"] for one in found["splits"][0]["bad"]}
    names = ("empty.jpg", "words.png", "cut.jpg", "float.tif", "huge.png")
    assert set(bad) == {f"ant/{name}" for name in names}
    assert "truncated" in bad["ant/cut.jpg"]
    assert "data.white" in bad["ant/float.tif"]
    assert "data.max_pixels=2500" in bad["ant/huge.png"]
    assert found["splits"][0]["classes"] == {"ant": 9, "bee": 4}
    text = command("data", "check", str(root)).out
    assert "4 cannot be read:" in text
    assert f"  cannot decode the image {jpeg}: " in text
    assert text.splitlines()[-1] == "4 files have to be repaired or removed"


def test_broken_links_are_named_and_the_rest_is_read(root: Path, command) -> None:
    (root / "train" / "bee" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "val" / "ant" / "itself.jpg").symlink_to("itself.jpg")
    (root / "val" / "bee" / "words.png").write_text("no image")
    said = command("data", "check", str(root), "--json")
    assert said.code == 1, said.err
    train, val = json.loads(said.out)["splits"]
    assert [one["file"] for one in train["bad"]] == ["bee/gone.png"]
    assert (
        f"gone.png is a link to {root}/nowhere.png, which is not there" in train["bad"][0]["reason"]
    )
    assert [one["file"] for one in val["bad"]] == ["ant/itself.jpg", "bee/words.png"]
    # Without folders of splits, too; what packs or trains refuses the link.
    words = ["data.val_share=0.5"]
    said = command("data", "check", str(root / "train"), *words)
    assert said.code == 1 and "gone.png is a link to" in said.out
    said = command("data", "pack", str(root), "--out", str(root / "shards"))
    assert said.code == 2 and "gone.png is a link to" in said.err


def test_equal_files_are_told_by_kind(root: Path, command) -> None:
    train, val = root / "train", root / "val"
    first = sorted(train.glob("ant/*"))
    shutil.copy(first[0], val / "ant" / "again.png")
    shutil.copy(first[1], train / "bee" / "other_label.png")
    shutil.copy(first[2], train / "ant" / "copy.png")
    for name in ("a.jpg", "b.jpg"):  # equal, but bad: told once
        (train / "bee" / name).touch()
    found = json.loads(command("data", "check", str(root), "--json").out)
    assert [(one["kind"], len(one["files"])) for one in found["equal"]] == [
        ("leak", 2),
        ("labels", 2),
        ("copies", 2),
    ]
    assert sorted(found["equal"][0]["files"]) == [f"train/ant/{first[0].name}", "val/ant/again.png"]
    text = command("data", "check", str(root)).out
    assert "1 equal, in training and in validation" in text


def test_very_different_classes_are_remarked(root: Path, command) -> None:
    for number in range(4 * IMBALANCE - 4):
        picture(root / "train" / "bee" / f"more{number}.png", 1000 + number, (3, 3))
    assert "bee has 40 images and ant 4" in command("data", "check", str(root)).out
    next(root.glob("train/bee/more*")).unlink()
    assert "a network sees the rare class" not in command("data", "check", str(root)).out


def test_long_lists_are_cut_in_the_text_only(root: Path, command) -> None:
    for number in range(25):
        (root / "train" / "bee" / f"{number:02}.jpg").touch()
    text = command("data", "check", str(root)).out
    assert "  .. and 5 more; --json lists all" in text
    found = json.loads(command("data", "check", str(root), "--json").out)
    assert len(found["splits"][0]["bad"]) == 25


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr=1"], "got optim.lr=1; expected a folder and the keys data.name, "),
        (["data.nme=x"], "data.nme"),
        (["data.root=elsewhere"], "got data.root=elsewhere"),
        (["data.train_limit=9"], "got data.train_limit=9"),
        (["data.name=digits"], "data.root"),
        ([], "has neither train/ nor val/"),
    ],
)
def test_what_cannot_be_checked(words: list[str], message: str, tmp_path: Path, command) -> None:
    (tmp_path / "empty").mkdir()
    said = command("data", "check", str(tmp_path / "empty"), *words)
    assert said.code == 2
    assert message in said.err


def test_label_maps_are_checked_with_their_images(tmp_path: Path, command) -> None:
    root = tmp_path / "set"
    for split, images in (("train", 3), ("val", 2)):
        for number in range(images):
            picture(root / "images" / split / f"{number}.png", 10 * images + number)
            labels_HW = np.repeat(np.array([0, 0, 1, 255], np.uint8), 5)
            labels = Image.fromarray(np.tile(labels_HW, (16, 1)))
            (root / "labels" / split).mkdir(parents=True, exist_ok=True)
            labels.save(root / "labels" / split / f"{number}.png")
    (root / "classes.txt").write_text("road\ncar\n")
    said = command("data", "check", str(root), "data.name=pairs")
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert lines[0] == "pairs/train: 3 images of 2 classes"
    assert lines[1] == "  pixels: road 50.00%, car 25.00%; no class 25.00%"
    assert lines[-1] == "every file is read"
    Image.fromarray(np.full((16, 20), 7, np.uint8)).save(root / "labels" / "train" / "0.png")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "labels" / "train" / "1.png")
    (root / "images" / "train" / "2.png").write_bytes(b"no picture")
    shutil.copy(root / "images" / "train" / "0.png", root / "images" / "val" / "1.png")
    said = command("data", "check", str(root), "data.name=pairs", "--json")
    assert said.code == 1
    found = json.loads(said.out)
    train = found["splits"][0]
    reasons = [(one["file"], one["reason"]) for one in train["bad"]]
    assert [file for file, _ in reasons] == ["2.png", "0.png", "1.png"]
    assert "it holds 7, and the set has 2 classes" in reasons[1][1]
    assert "20x16 pixels and its label map" in reasons[2][1]
    assert train["classes"] == {"road": 160, "car": 80}
    assert [one["kind"] for one in found["equal"]] == ["leak"]
    said = command("data", "pack", str(root), "data.name=pairs", "--out", str(tmp_path / "out"))
    assert said.code == 2 and "shards hold images with labels as a whole" in said.err
    (root / "labels" / "val" / "0.png").unlink()
    (root / "labels" / "val" / "0.png").symlink_to("gone.png")
    (root / "images" / "val" / "1.png").unlink()
    (root / "images" / "val" / "1.png").symlink_to("gone.png")
    said = command("data", "check", str(root), "data.name=pairs", "--json")
    bad = json.loads(said.out)["splits"][1]["bad"]
    assert [one["file"] for one in bad] == ["1.png", "0.png"]
    assert all("is a link to gone.png, which is not there" in one["reason"] for one in bad)


def test_a_split_of_bad_files_only_is_still_json(root: Path, command) -> None:
    for file in root.glob("val/*/*"):
        file.write_bytes(b"")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    said = command("data", "check", str(root), "--json")
    found = json.loads(said.out, parse_constant=refuse)
    assert found["splits"][1]["median_size"] is None
    assert "Warning" not in said.err


def test_a_mistake_in_val_is_told_before_train_is_read(root: Path, command) -> None:
    shutil.rmtree(root / "val" / "bee")
    (root / "val" / "bee").mkdir()
    said = command("data", "check", str(root))
    assert said.code == 2
    assert "Reading" not in said.err


def test_a_released_set_of_several_labels(tmp_path: Path, command) -> None:
    folder = tmp_path / "VOCdevkit" / "VOC2007"
    for split, names in (("trainval", ("1", "2", "3")), ("test", ("4",))):
        (folder / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names))
    for name, shows in (("1", ["dog"]), ("2", ["dog", "cat"]), ("3", ["dog"]), ("4", ["cat"])):
        objects = "".join(
            f"<object><name>{one}</name><difficult>0</difficult></object>" for one in shows
        )
        (folder / "Annotations").mkdir(exist_ok=True)
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
        picture(folder / "JPEGImages" / f"{name}.jpg", 0 if name in "12" else int(name))
    said = command("data", "check", str(tmp_path), "data.name=voc2007", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    classes = found["splits"][0]["classes"]
    assert (classes["dog"], classes["cat"], classes["bird"]) == (3, 1, 0)
    assert found["equal"] == [
        {"kind": "labels", "files": ["train/JPEGImages/1.jpg", "train/JPEGImages/2.jpg"]}
    ]


def test_other_actions_and_a_missing_folder_are_mistakes(command) -> None:
    assert "did you mean check?" in command("data", "checks", ".").err
    assert command("data", "check").code == 2
