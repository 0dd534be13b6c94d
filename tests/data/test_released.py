"""Data sets in the layout of their release: small ones, listed as the real ones are."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastkd.data.batch import IGNORED
from fastkd.data.sources.by_name import open_source
from fastkd.data.sources.folder import FolderIndex
from fastkd.data.sources.image_set import first_labels
from fastkd.data.sources.listing import listing_of
from fastkd.data.sources.released import LAYOUTS, VOC_CLASSES
from fastkd.errors import UserError

RANDOM = np.random.default_rng(0)


def picture(file: Path, side: int = 40) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = RANDOM.integers(0, 256, (side, side + 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="JPEG")


def text(file: Path, *lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def tiny_imagenet(root: Path) -> None:
    folder = root / "tiny-imagenet-200"
    text(folder / "wnids.txt", "n02124075", "n01443537", "n04067472")
    for wnid in ("n01443537", "n02124075", "n04067472"):
        for number in range(3):
            picture(folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG")
        text(folder / "train" / wnid / f"{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t10\t63\t58")
    rows = [("val_1.JPEG", "n04067472"), ("val_0.JPEG", "n02124075")]
    text(folder / "val/val_annotations.txt", *(f"{f}\t{w}\t0\t32\t44\t62" for f, w in rows))
    for file, _ in rows:
        picture(folder / "val/images" / file)
    picture(folder / "test/images/test_0.JPEG")


def voc_annotation(*objects: tuple[str, int]) -> str:
    inside = "".join(
        f"<object><name>{name}</name><pose>Left</pose><difficult>{hard}</difficult></object>"
        for name, hard in objects
    )
    return f"<annotation><folder>VOC2007</folder>{inside}</annotation>"


VOC = {
    "trainval": {
        "000005": [("chair", 0), ("chair", 1)],
        "000007": [("car", 0), ("person", 1)],
        "000009": [("horse", 0), ("person", 0), ("person", 1)],
    },
    "test": {"000001": [("dog", 0), ("person", 0)], "000002": [("train", 1)]},
}


def voc2007(root: Path) -> None:
    folder = root / "VOCdevkit" / "VOC2007"
    for split, images in VOC.items():
        text(folder / "ImageSets/Main" / f"{split}.txt", *images)
        for name, objects in images.items():
            text(folder / "Annotations" / f"{name}.xml", voc_annotation(*objects))
            picture(folder / "JPEGImages" / f"{name}.jpg")


def cub200(root: Path) -> None:
    folder = root / "CUB_200_2011"
    names = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    text(folder / "classes.txt", *(f"{n + 1} {name}" for n, name in enumerate(names)))
    files = [f"{names[n % 2]}/{n}.jpg" for n in range(5)]
    text(folder / "images.txt", *(f"{n + 1} {file}" for n, file in enumerate(files)))
    text(folder / "image_class_labels.txt", *(f"{n + 1} {n % 2 + 1}" for n in range(5)))
    text(folder / "train_test_split.txt", "1 1", "2 0", "3 0", "4 1", "5 1")
    for file in files:
        picture(folder / "images" / file)


def birdsnap(root: Path) -> None:
    folder = root / "birdsnap"
    species = [("1", "Acadian Flycatcher", "Acadian_Flycatcher"), ("2", "Blue Jay", "Blue_Jay")]
    text(
        folder / "species.txt",
        "id\tcommon\tscientific\tdir",
        *(f"{number}\t{common}\tlatin name\t{place}" for number, common, place in species),
    )
    files = [("Acadian_Flycatcher/1.jpg", 1), ("Blue_Jay/2.jpg", 2), ("Blue_Jay/3.jpg", 2)]
    files += [("Blue_Jay/4.jpg", 2), ("Acadian_Flycatcher/5.jpg", 1), ("Blue_Jay/gone.jpg", 2)]
    text(
        folder / "images.txt",
        "url\tmd5\tpath\tspecies_id\tbb_x1\tbb_y1\tback_x\tback_y",
        *(f"http://x/{n}\tabc\t{file}\t{label}\t1\t2\t\t" for n, (file, label) in enumerate(files)),
    )
    text(folder / "test_images.txt", "path", files[3][0], files[4][0])
    for file, _ in files[:-1]:
        picture(folder / "download/images" / file)


MAKERS: Mapping[str, Callable[[Path], None]] = {
    "tiny_imagenet": tiny_imagenet,
    "voc2007": voc2007,
    "cub200": cub200,
    "birdsnap": birdsnap,
}
EXPECTED = {
    ("tiny_imagenet", "train"): [0, 0, 0, 1, 1, 1, 2, 2, 2],
    ("tiny_imagenet", "val"): [2, 1],
    ("cub200", "train"): [0, 1, 0],
    ("cub200", "val"): [1, 0],
    ("birdsnap", "train"): [0, 1, 1],
    ("birdsnap", "val"): [1, 0],
}


@pytest.fixture(params=list(MAKERS))
def name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    MAKERS[request.param](tmp_path)
    return request.param


def opened(name: str, root: Path, split: str = "train", **more: int) -> FolderIndex:
    source = open_source(name, root, split, **more)
    assert isinstance(source, FolderIndex)
    return source


def test_every_layout_is_tested() -> None:
    assert set(MAKERS) == set(LAYOUTS)


@pytest.mark.parametrize(("name", "split"), EXPECTED)
def test_labels_are_those_of_the_lists(tmp_path: Path, name: str, split: str) -> None:
    MAKERS[name](tmp_path)
    source = opened(name, tmp_path, split)
    assert source.labels_N.tolist() == EXPECTED[name, split]
    assert source.labels_N.dtype == np.int64
    for sample in range(len(source)):
        assert source.image(sample).size == (47, 40)
    if name == "tiny_imagenet":
        assert source.classes == ("n01443537", "n02124075", "n04067472")
    elif split == "train":  # the class is in the path
        place = {"cub200": 1, "birdsnap": 2}[name]
        files = [bytes(file).decode().split("/")[place] for file in source.files_N]
        assert files == [source.classes[label] for label in source.labels_N]


def test_voc_has_the_classes_of_an_image_and_none_for_difficult_ones(tmp_path: Path) -> None:
    voc2007(tmp_path)
    for split, images in (("train", VOC["trainval"]), ("val", VOC["test"])):
        source = opened("voc2007", tmp_path, split)
        assert source.classes == VOC_CLASSES
        assert source.labels_N.shape == (len(images), 20)
        assert source.labels_N.dtype == np.float32
        for labels_C, objects in zip(source.labels_N, images.values(), strict=True):
            easy = {name for name, hard in objects if not hard}
            hard = {name for name, hard in objects if hard} - easy
            for one, label in zip(VOC_CLASSES, labels_C, strict=True):
                assert label == (1 if one in easy else IGNORED if one in hard else 0)
    assert len(opened("voc2007", tmp_path, limit=2)) == 2


def test_the_root_may_be_the_release_itself_or_a_folder_above(name: str, tmp_path: Path) -> None:
    above = opened(name, tmp_path)
    inside = opened(name, tmp_path / LAYOUTS[name].folder)
    assert np.array_equal(above.labels_N, inside.labels_N)
    assert above.sizes == inside.sizes


def test_a_missing_image_is_named_or_counted(name: str, tmp_path: Path) -> None:
    first = Path(opened(name, tmp_path).path(0))
    first.unlink()
    if name == "tiny_imagenet":  # its training images are in no list
        assert len(opened(name, tmp_path)) == 8
    elif name == "birdsnap":
        source = opened(name, tmp_path)
        assert len(source) == 2
        remark = "birdsnap/train lists 4 images, 2 of which are not there"
        assert source.remarks == (remark,)
    else:
        with pytest.raises(UserError, match=rf"1 of them are not there \(.*{first.name}"):
            opened(name, tmp_path)


def test_images_that_were_never_fetched_and_splits_without_images(tmp_path: Path) -> None:
    birdsnap(tmp_path)
    shutil.rmtree(tmp_path / "birdsnap/download")
    with pytest.raises(UserError, match=r"4 of them are not there .*fetch them with its program"):
        opened("birdsnap", tmp_path)
    cub200(tmp_path)
    text(tmp_path / "CUB_200_2011/train_test_split.txt", *(f"{n + 1} 1" for n in range(5)))
    with pytest.raises(UserError, match="have no image for val"):
        opened("cub200", tmp_path, "val")


SWAPPED = {
    "tiny_imagenet": ("val/val_annotations.txt", "n04067472", "n02124075"),
    "voc2007": ("Annotations/000001.xml", "dog", "cat"),
    "cub200": ("image_class_labels.txt", "2 2", "2 1"),
    "birdsnap": ("images.txt", "4.jpg\t2", "4.jpg\t1"),
}


def test_other_labels_are_other_data(name: str, tmp_path: Path) -> None:
    """The same files and sizes, and as many images of each class where two are swapped."""
    before = listing_of(opened(name, tmp_path, "val"))
    file, old, new = SWAPPED[name]
    place = tmp_path / LAYOUTS[name].folder / file
    words = place.read_text()
    if name == "tiny_imagenet":
        new_words = words.replace(old, "x").replace(new, old).replace("x", new)
    else:
        new_words = words.replace(old, new)
    assert new_words != words
    place.write_text(new_words)
    assert not before.same(listing_of(opened(name, tmp_path, "val")))
    place.write_text(words)
    assert before.same(listing_of(opened(name, tmp_path, "val")))


def test_lists_may_come_from_windows(name: str, tmp_path: Path) -> None:
    before = opened(name, tmp_path)
    for file in (tmp_path / LAYOUTS[name].folder).rglob("*.txt"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    after = opened(name, tmp_path)
    assert before.classes == after.classes
    assert np.array_equal(before.labels_N, after.labels_N)


DAMAGE = {
    "tiny_imagenet": ("val/val_annotations.txt", "val_0.JPEG\tn99999999\t1\t1\t1\t1", "no class"),
    "voc2007": ("Annotations/000001.xml", "<annotation><object>", "no XML"),
    "cub200": ("image_class_labels.txt", "1", "line 1: 1 has too few fields .1., expected 2"),
    "birdsnap": ("species.txt", "id\tcommon\tdir\n1\tx", "1 lacks fields"),
}


def test_a_damaged_list_is_named(name: str, tmp_path: Path) -> None:
    file, content, message = DAMAGE[name]
    (tmp_path / LAYOUTS[name].folder / file).write_text(content + "\n")
    with pytest.raises(UserError, match=message) as raised:
        opened(name, tmp_path, "val")
    assert Path(file).name in str(raised.value)


def test_lists_of_other_bytes_are_refused(name: str, tmp_path: Path) -> None:
    lists = {"voc2007": "ImageSets/Main/test.txt", "tiny_imagenet": "wnids.txt"}
    file = tmp_path / LAYOUTS[name].folder / lists.get(name, "images.txt")
    for content in (b"\xff\xfe\x00 \x80\n", b"\0" * 40):
        file.write_bytes(content)
        with pytest.raises(UserError, match="is not UTF-8 text"):
            opened(name, tmp_path, "val")


OBJECT = "<object><name>dog</name><difficult>{}</difficult></object>"
# (set, list, what is added, or what it becomes, split, what is said)
HOSTILE = [
    ("tiny_imagenet", "wnids.txt", "+n02124075", "train", "class n02124075 twice"),
    ("tiny_imagenet", "wnids.txt", "n01443537\nn02124075", "train", "does not name .n04067472"),
    ("tiny_imagenet", "val/val_annotations.txt", "+val_1.JPEG\tn02124075", "val", "twice"),
    ("tiny_imagenet", "val/val_annotations.txt", "+../a.JPEG\tn02124075", "val", "out of the set"),
    ("cub200", "image_class_labels.txt", "+1 2", "train", "labels.txt names 1 twice"),
    ("cub200", "train_test_split.txt", "+1 0", "train", "split.txt names 1 twice"),
    ("cub200", "images.txt", "+1 002.Laysan_Albatross/1.jpg", "train", "images.txt names 1 twice"),
    ("cub200", "classes.txt", "+1 003.X", "train", "classes.txt names 1 twice"),
    ("cub200", "classes.txt", "1 B\n2 B", "train", "class B twice"),
    ("cub200", "classes.txt", "1 \x1b[31mA\n2 B", "train", "has control characters"),
    ("cub200", "train_test_split.txt", "1 1\n2 0\n3 0\n4 2\n5 1", "train", "2, expected 1"),
    ("cub200", "image_class_labels.txt", "1 1\n2 2", "train", "labels.txt and images.txt do not"),
    ("birdsnap", "species.txt", "+1\tx\ty\tX", "train", "species.txt names 1 twice"),
    ("birdsnap", "images.txt", "+u\tm\tBlue_Jay/2.jpg\t1\t\t", "train", "2.jpg twice"),
    ("birdsnap", "test_images.txt", "+Blue_Jay/99.jpg", "train", "which images.txt does not"),
    ("birdsnap", "test_images.txt", "path", "train", "names no image"),
    ("voc2007", "ImageSets/Main/test.txt", "+000001", "val", "twice"),
    ("voc2007", "ImageSets/Main/test.txt", "+/etc/passwd", "val", "expected an image id"),
    ("voc2007", "ImageSets/Main/test.txt", "+000099", "val", "lists 000099, and .* is not there"),
    ("voc2007", "Annotations/000001.xml", "<annotation></annotation>", "val", "no annotation"),
    ("voc2007", "Annotations/000001.xml", "<html/>", "val", "no annotation with objects"),
    *(
        (
            "voc2007",
            "Annotations/000001.xml",
            f"<annotation>{OBJECT.format(word)}</annotation>",
            "val",
            "expected 0 or 1",
        )
        for word in ("true", "01", "")
    ),
]


@pytest.mark.parametrize(("name", "file", "content", "split", "said"), HOSTILE)
def test_lists_that_contradict_themselves_are_refused(
    tmp_path: Path, name: str, file: str, content: str, split: str, said: str
) -> None:
    MAKERS[name](tmp_path)
    place = tmp_path / LAYOUTS[name].folder / file
    before = place.read_text() if content.startswith("+") else ""
    place.write_text(before + content.removeprefix("+") + "\n")
    with pytest.raises(UserError, match=said):
        opened(name, tmp_path, split)


def test_spaces_at_the_end_of_a_line_are_no_part_of_a_name(tmp_path: Path) -> None:
    birdsnap(tmp_path)
    file = tmp_path / "birdsnap/test_images.txt"
    file.write_text(file.read_text().replace(".jpg", ".jpg "))
    assert opened("birdsnap", tmp_path, "val").labels_N.tolist() == EXPECTED["birdsnap", "val"]


def test_names_may_have_spaces(tmp_path: Path) -> None:
    cub200(tmp_path)
    folder = tmp_path / "CUB_200_2011"
    text(folder / "classes.txt", "1 Black Albatross", "2 Black Bird")
    images = folder / "images.txt"
    images.write_text(images.read_text().replace("/0.jpg", "/a b.jpg"))
    (folder / "images/001.Black_footed_Albatross/0.jpg").rename(
        folder / "images/001.Black_footed_Albatross/a b.jpg"
    )
    source = opened("cub200", tmp_path)
    assert source.classes == ("Black Albatross", "Black Bird")
    assert source.path(0).endswith("a b.jpg")


def test_tiny_imagenet_as_people_have_it(tmp_path: Path) -> None:
    """Val sorted by the widespread script, files of macOS, a class that was lost."""
    tiny_imagenet(tmp_path)
    folder = tmp_path / "tiny-imagenet-200"
    for file, wnid in (("val_1.JPEG", "n04067472"), ("val_0.JPEG", "n02124075")):
        place = folder / "val" / wnid / "images"
        place.mkdir(parents=True)
        (folder / "val/images" / file).rename(place / file)
    (folder / "val/images").rmdir()
    assert opened("tiny_imagenet", tmp_path, "val").labels_N.tolist() == [2, 1]
    images = folder / "train/n01443537/images"
    (images / "._n01443537_0.JPEG").touch()
    assert len(opened("tiny_imagenet", tmp_path)) == 9
    for file in images.glob("n*"):
        file.unlink()
    with pytest.raises(UserError, match="n01443537/images holds no image"):
        opened("tiny_imagenet", tmp_path)


@pytest.mark.parametrize("content", ['<?xml version="1.0" encoding="no-such"?><a/>', "a\0b", ""])
def test_annotations_that_are_no_xml(tmp_path: Path, content: str) -> None:
    voc2007(tmp_path)
    (tmp_path / "VOCdevkit/VOC2007/Annotations/000002.xml").write_text(content)
    with pytest.raises(UserError, match=r"000002.xml is no XML"):
        opened("voc2007", tmp_path, "val")


def test_a_table_without_its_columns(tmp_path: Path) -> None:
    birdsnap(tmp_path)
    file = tmp_path / "birdsnap/images.txt"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"expected also path and species_id|expected also path"):
        opened("birdsnap", tmp_path)


def test_a_subset_counts_images_without_a_sure_label_apart(tmp_path: Path) -> None:
    voc2007(tmp_path)
    source = opened("voc2007", tmp_path, "val", limit=1)
    assert source.files_N.tolist() == [b"JPEGImages/000001.jpg"]
    labels_NC = np.array([[0, -1], [1, 1], [0, 0], [0, 1]], dtype=np.float32)
    assert first_labels(labels_NC).tolist() == [2, 0, 2, 1]


def test_a_sorted_copy_is_taken_and_nothing_is_named(make_folder, tmp_path: Path) -> None:
    root = make_folder(classes=tuple(f"bird{n:03}" for n in range(200)), per_class=1, val="test")
    assert len(opened("cub200", root)) == 200
    with pytest.raises(UserError, match=r"holds 200 classes, birdsnap has 500; use data\.name="):
        opened("birdsnap", root)
    with pytest.raises(UserError, match=r"voc2007 was not found: looked in .*VOC2007 for "):
        opened("voc2007", root)
    with pytest.raises(UserError, match=r"birdsnap was not found.* or for train/ with val/"):
        opened("birdsnap", tmp_path / "nowhere")


RECIPES = {
    "tiny_imagenet": ("kdda/tiny_imagenet/wrn_40_2--wrn_16_2/kd@480", "data.image_size=40"),
    "voc2007": ("transfer/voc2007/resnet50-random/scratch", "student.name=timm:resnet10t"),
    "cub200": ("transfer/cub200/resnet50-random/scratch", "student.name=timm:resnet10t"),
    "birdsnap": ("transfer/birdsnap/resnet50-random/scratch", "student.name=timm:resnet10t"),
}


def test_the_papers_recipes_run_on_it(name: str, tmp_path: Path, command) -> None:
    recipe, key = RECIPES[name]
    said = command("train", recipe, "--dry-run", f"data.root={tmp_path}", key, "batch_size=2")
    assert said.code == 0, said.err
    classes = {"tiny_imagenet": 3, "voc2007": 20, "cub200": 2, "birdsnap": 2}[name]
    assert re.search(rf"\b{classes} classes", said.out + said.err)


@pytest.mark.parametrize("crop", ["resized", "pad"])
def test_a_network_is_trained_on_images_of_several_labels(tmp_path: Path, command, crop) -> None:
    """Decoded anew in every epoch, and resident."""
    voc2007(tmp_path / "data")
    keys = ["data.image_size=32", "student.name=resnet8", "student.pretrained=false", "epochs=2"]
    keys += ["batch_size=2", f"data.root={tmp_path / 'data'}", "data.workers=0"]
    keys += [f"augment.crop={crop}", "student.new_head=false"]
    said = command("train", "transfer/voc2007/resnet50-random/scratch", *keys)
    assert said.code == 0, said.err
    (summary,) = tmp_path.glob("runs/**/summary.json")
    found = json.loads(summary.read_text())
    assert 0 < found["map_last"] <= 1
    assert "accuracy_last" not in found
