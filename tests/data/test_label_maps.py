"""Label maps: a set's numbers become class ids or 255, and what is wrong is one sentence."""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastkd.data.config import DataConfig
from fastkd.data.loaders.dense_pair import open_both
from fastkd.data.sources.label_ids import NO_CLASS
from fastkd.data.sources.listing import listing_of
from fastkd.errors import UserError

from .label_map_sets import (
    CITYSCAPES_TRAIN_IDS,
    label_map,
    make_camvid,
    make_cityscapes,
    make_pairs,
    make_voc,
    picture,
)


def both(name: str, root: Path | None, **keys):
    return open_both(DataConfig(name=name, root=None if root is None else str(root), **keys))


def test_cityscapes_has_the_19_classes_of_its_own_table(tmp_path):
    train, val = both("cityscapes", make_cityscapes(tmp_path / "cityscapes").parent)
    assert (train.name, len(train), len(val)) == ("cityscapes/train", 4, 4)
    assert train.classes[:3] == ("road", "sidewalk", "building") and len(train.classes) == 19
    assert train.palette is not None
    assert train.palette[0] == (128, 64, 128) and train.palette[18] == (119, 11, 32)
    stored_HW = np.resize(np.arange(34, dtype=np.uint8), (16, 32))
    wanted = dict(CITYSCAPES_TRAIN_IDS)
    expected_HW = np.vectorize(wanted.__getitem__)(stored_HW)
    for split in (train, val):
        for sample in range(len(split)):
            np.testing.assert_array_equal(split.label_map(sample), expected_HW)
    assert sorted(set(wanted.values())) == [*range(19), 255]
    assert train.file(0) == "aachen/aachen_000000_000019_leftImg8bit.png"
    assert train.map_file(0) == "aachen/aachen_000000_000019_gtFine_labelIds.png"


def test_camvid_in_both_layouts(tmp_path):
    root = make_camvid(tmp_path / "a")
    tutorial = tmp_path / "b" / "CamVid"
    for split in ("train", "val"):
        for ours, theirs in (("images", split), ("labels", f"{split}annot")):
            (tutorial / theirs).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(root / split / ours, tutorial / theirs)
    for place in (root, tmp_path / "b"):
        train, val = both("camvid", place)
        assert (len(train), len(val), len(train.classes)) == (6, 3, 11)
        stored_HW = np.asarray(Image.open(root / "train" / "labels" / "000.png"))
        expected_HW = np.where(stored_HW == 11, NO_CLASS, stored_HW)
        np.testing.assert_array_equal(train.label_map(0), expected_HW)
        assert set(np.unique(expected_HW)) == {*range(11), NO_CLASS}


def test_voc_reads_its_palette_indices_and_its_lists(tmp_path):
    train, val = both("voc_segmentation", make_voc(tmp_path))
    assert (len(train), len(val)) == (3, 2)
    assert train.classes[:2] == ("background", "aeroplane") and len(train.classes) == 21
    # As the devkit's VOClabelcolormap has them.
    assert train.palette is not None
    assert train.palette[:3] == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    assert train.palette[20] == (0, 64, 128)
    with Image.open(train.map_path(1)) as stored:
        assert stored.mode == "P"
        np.testing.assert_array_equal(train.label_map(1), np.asarray(stored))
    assert train.label_map(1).max() == NO_CLASS


def test_pairs_with_colours_names_and_ignored_numbers(tmp_path):
    classes = "void,0,0,0\nignore,9,9,9\nroad,128,64,128\n"
    root = make_pairs(tmp_path / "grey", classes=classes, numbers=(0, 1, 2))
    train, val = both("pairs", root)
    assert (train.classes, train.palette) == (("void", "road"), ((0, 0, 0), (128, 64, 128)))
    stored_HW = np.asarray(Image.open(root / "labels" / "train" / "0.png"))
    expected_HW = np.array([0, NO_CLASS, 1])[stored_HW]
    np.testing.assert_array_equal(train.label_map(0), expected_HW)
    # The same numbers as colours.
    colours = np.array([(0, 0, 0), (9, 9, 9), (128, 64, 128)], np.uint8)
    for file in (root / "labels").rglob("*.png"):
        Image.fromarray(colours[np.asarray(Image.open(file))]).save(file)
    again, _ = both("pairs", root)
    np.testing.assert_array_equal(again.label_map(0), expected_HW)
    assert val.name == "pairs/val"


def test_pairs_are_held_back_and_found_by_other_folders(tmp_path):
    root = make_pairs(tmp_path, splits=(), each=10)
    train, val = both("pairs", root, val_share=0.2)
    assert (len(train), len(val)) == (8, 2)
    files = {train.file(n) for n in range(8)} | {val.file(n) for n in range(2)}
    assert files == {f"{n}.jpg" for n in range(10)}
    assert all(Path(train.file(n)).stem == Path(train.map_file(n)).stem for n in range(8))
    (root / "images").rename(tmp_path / "pictures")
    keys = {
        "image_dir": str(tmp_path / "pictures"),
        "label_dir": str(root / "labels"),
        "classes_file": str(root / "classes.txt"),
    }
    moved, _ = both("pairs", None, val_share=0.2, **keys)
    assert [moved.file(n) for n in range(8)] == [train.file(n) for n in range(8)]


def test_a_limit_is_spread_evenly(tmp_path):
    root = make_camvid(tmp_path, sizes=((20, 16),) * 10)
    train, _ = both("camvid", root, train_limit=4)
    assert [train.file(n) for n in range(4)] == ["000.png", "002.png", "005.png", "007.png"]
    whole, _ = both("camvid", root)
    np.testing.assert_array_equal(train.label_map(2), whole.label_map(5))
    assert train.listing != whole.listing
    with pytest.raises(UserError, match=r"subset of 11 images .* has 10"):
        both("camvid", root, train_limit=11)


def test_pixels_are_counted_from_all_label_maps(tmp_path):
    train, _ = both("camvid", make_camvid(tmp_path))
    maps = np.concatenate([train.label_map(n).ravel() for n in range(len(train))])
    expected = [int((maps == label).sum()) for label in (*range(11), NO_CLASS)]
    assert train.count_pixels(lambda done, total: None).tolist() == expected


def test_a_changed_label_map_or_meaning_changes_the_listing(tmp_path):
    root = make_pairs(tmp_path, numbers=(0, 1, 2))
    train, _ = both("pairs", root)
    before = listing_of(train)
    assert (before.counts, before.num, before.images) == ((), 4, 4)
    label_map(root / "labels" / "train" / "2.png", (24, 20), (0, 1), seed=77)
    after = listing_of(both("pairs", root)[0])
    assert not before.same(after)
    (root / "classes.txt").write_text("sky\nroad\nignore\n")
    assert listing_of(both("pairs", root)[0]).files != after.files


def _rgb(file: Path) -> None:
    Image.open(file).convert("RGB").save(file)


def _deep(file: Path) -> None:
    Image.fromarray(np.asarray(Image.open(file)).astype(np.uint16)).save(file)


def _beyond(file: Path) -> None:
    label_map(file, Image.open(file).size, (0, 12, 40))


def _smaller(file: Path) -> None:
    label_map(file, (39, 30), (0,))


def _few_bits(file: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        )

    header = (40).to_bytes(4, "big") + (30).to_bytes(4, "big") + bytes([4, 0, 0, 0, 0])
    rows = b"".join(b"\0" + b"\x11" * 20 for _ in range(30))
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def _jpeg(file: Path) -> None:
    image = Image.fromarray(np.zeros((30, 40), np.uint8))
    image.save(file, format="JPEG")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_rgb, r"001\.png: it holds colours .*mode RGB.*8-bit grey or palette PNG"),
        (_deep, r"001\.png: it has more than 8 bits a pixel \(mode I;16"),
        (_beyond, r"001\.png: it holds 12, 40, and the set has 11 classes, numbered from 0 to 10"),
        (_smaller, r"001\.png has 40x30 pixels and its label map .*001\.png 39x30"),
        (_few_bits, r"001\.png: it has fewer than 8 bits for a grey pixel"),
        (_jpeg, r"001\.png: it is JPEG by its content, whatever its name says"),
        (lambda file: file.write_bytes(b"no picture"), r"001\.png: it is not an image"),
    ],
    ids=["colours", "16 bits", "range", "size", "4 bits", "JPEG", "damaged"],
)
def test_a_wrong_label_map_is_named_in_one_sentence(tmp_path, harm, message):
    root = make_camvid(tmp_path)
    train, _ = both("camvid", root)
    harm(root / "train" / "labels" / "001.png")
    with pytest.raises(UserError, match=message) as caught:
        train.pair(1)
    assert "\n" not in str(caught.value)


def test_partners_that_are_missing_are_counted_and_named(tmp_path):
    root = make_camvid(tmp_path)
    (root / "train" / "labels" / "002.png").unlink()
    (root / "train" / "images" / "004.png").unlink()
    with pytest.raises(UserError) as caught:
        both("camvid", root)
    said = str(caught.value)
    assert "1 image in" in said and "without a label map" in said and "002.png" in said
    assert "1 label map in" in said and "without an image" in said and "004.png" in said


def test_what_is_not_there_is_said(tmp_path):
    for name, wanted in (
        ("cityscapes", "leftImg8bit/ and gtFine/"),
        ("camvid", "train/images/ and train/labels/"),
        ("voc_segmentation", "ImageSets/Segmentation/"),
    ):
        with pytest.raises(UserError, match=f"{name} was not found: looked in .*{wanted}"):
            both(name, tmp_path)
        with pytest.raises(UserError, match=r"needs data\.root"):
            both(name, None)
    with pytest.raises(UserError, match=r"images is not a folder; set data\.image_dir"):
        both("pairs", tmp_path)
    with pytest.raises(UserError, match=r"needs data\.root with images/"):
        both("pairs", None)
    nowhere = rf"data\.root={tmp_path}/nowhere is not a folder; expected images/, labels/ and cl"
    for keys in ({}, {"image_dir": str(tmp_path)}):
        with pytest.raises(UserError, match=nowhere):
            both("pairs", tmp_path / "nowhere", **keys)
    root = make_pairs(tmp_path / "p", splits=())
    with pytest.raises(UserError, match=r"set data\.val_share=0\.1"):
        both("pairs", root)
    (root / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"classes\.txt is not there; write it"):
        both("pairs", root)


def test_endings_in_upper_case_are_label_maps_too(tmp_path):
    root = make_pairs(tmp_path, splits=(), each=4)
    expected = [both("pairs", root, val_share=0.5)[0].label_map(n) for n in range(2)]
    for file in list((root / "labels").iterdir()):
        file.rename(file.with_suffix(".PNG"))
    train, _ = both("pairs", root, val_share=0.5)
    assert train.map_file(0).endswith(".PNG")
    np.testing.assert_array_equal([train.label_map(n) for n in range(2)], expected)


def test_lossy_label_maps_and_doubtful_names(tmp_path):
    root = make_pairs(tmp_path, splits=(), each=2)
    for file in list((root / "labels").iterdir()):
        Image.open(file).save(file.with_suffix(".jpg"))
        file.unlink()
    with pytest.raises(UserError, match="has no PNG file"):
        both("pairs", root, val_share=0.5)
    picture(root / "images" / "0.bmp", (24, 20))
    with pytest.raises(UserError, match=r"0\.bmp and 0\.jpg, which have one label map"):
        both("pairs", root, val_share=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sky\n", "has 1 classes"),
        ("sky\nsky\n", "of 1 names"),
        ("sky,1,2\nroad\n", r"line 1: sky,1,2: expected NAME or NAME,RED,GREEN,BLUE"),
        ("sky,1,2,256\nroad\n", r"line 1"),
        ("sky\n\nroad\n", r"line 2"),
        ("sky,1,2,3\nroad\n", "a colour of its own for every class"),
        ("sky,1,2,3\nroad,1,2,3\n", "a colour of its own for every class"),
        ("a\x07b\nroad\n", "has control characters"),
    ],
)
def test_a_wrong_file_of_classes(tmp_path, text, message):
    root = make_pairs(tmp_path, classes=text)
    with pytest.raises(UserError, match=message):
        both("pairs", root)


def test_colours_that_no_class_has(tmp_path):
    root = make_pairs(tmp_path, classes="sky,0,0,0\nroad,1,1,1\n", numbers=(0, 1))
    file = root / "labels" / "train" / "0.png"
    Image.fromarray(np.full((20, 24, 3), 7, np.uint8)).save(file)
    with pytest.raises(UserError, match=r"0\.png: it holds colours .*\(7,7,7\)"):
        both("pairs", root)[0].label_map(0)


COLOURS = ((10, 20, 30), (200, 0, 0), (0, 0, 250))


def _with_palette(file: Path, numbers: np.ndarray, colours) -> None:
    image = Image.fromarray(numbers)
    image.putpalette([part for colour in colours for part in colour])
    image.save(file)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_palette_in_another_order_than_the_classes_is_refused(tmp_path, number):
    text = "".join(f"{n},{','.join(map(str, c))}\n" for n, c in zip("abc", COLOURS, strict=True))
    root = make_pairs(tmp_path, classes=text, numbers=(0, 1, 2))
    file = root / "labels" / "train" / "0.png"
    numbers = np.full((20, 24), number, np.uint8)
    other = (*COLOURS[1:], COLOURS[0])
    _with_palette(file, numbers, other)
    colour = ",".join(map(str, other[number]))
    with pytest.raises(UserError, match=rf"has the colour {colour} at number {number}, and .*RGB"):
        both("pairs", root)[0].label_map(0)
    for fits in (COLOURS, ((1, 1, 1), (2, 2, 2), (3, 3, 3)), COLOURS[: number + 1]):
        _with_palette(file, numbers, fits)
        assert (both("pairs", root)[0].label_map(0) == number).all()
    # What has no class may have any colour, as the rest of a short palette has black.
    _with_palette(file, np.full((20, 24), NO_CLASS, np.uint8), [COLOURS[1]] * 256)
    assert (both("pairs", root)[0].label_map(0) == NO_CLASS).all()


def test_extensions_may_be_of_any_case(tmp_path):
    root = make_pairs(tmp_path)
    for place, ending in (("images", ".JPG"), ("labels", ".PNG")):
        file = root / place / "train" / f"1{ending.lower()}"
        file.rename(file.with_suffix(ending))
    train = both("pairs", root)[0]
    assert len(train) == 4 and train.map_file(1) == "1.PNG"
    assert train.pair(1)[1].shape == (20, 24)


@pytest.mark.skipif(not os.environ.get("FASTKD_TEST_DATA"), reason="FASTKD_TEST_DATA is not set")
def test_camvids_own_images():
    root = Path(os.environ["FASTKD_TEST_DATA"]) / "camvid"
    if not root.is_dir():
        pytest.skip("camvid is not in FASTKD_TEST_DATA")
    train, val = both("camvid", root)
    assert (len(train), len(val)) == (180, 60)
    assert set(train.picture_sizes) == {(480, 360)}
    counts = train.count_pixels(lambda done, total: None)
    assert counts.sum() == 180 * 480 * 360 and (counts > 0).all()
    # Sky, building and road fill most of a street.
    assert set(np.argsort(-counts)[:3].tolist()) == {0, 1, 3}
