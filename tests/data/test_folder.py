"""ImageFolder sets: canonical order, sizes, and every way in which a folder can be wrong."""

import shutil

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from fastkd.data import open_source, open_split
from fastkd.errors import UserError


@pytest.mark.parametrize("val", ["val", "test"])
def test_order_labels_and_pixels_are_those_of_torchvision(make_folder, val):
    root = make_folder(val=val)
    nested = root / "train" / "bee" / "sub"
    nested.mkdir()
    Image.new("RGB", (12, 12), (1, 2, 3)).save(nested / "a.png")
    Image.new("RGB", (12, 12), (4, 5, 6)).save(nested.parent / "zzz.png")
    (root / "train" / "bee" / "notes.txt").write_text("not an image")
    (root / "train" / ".hidden").mkdir()
    for split, folder in (("train", "train"), ("val", val)):
        ours = open_split("folder", root, split)
        theirs = ImageFolder(
            str(root / folder), is_valid_file=lambda path: path.endswith(".png"), allow_empty=True
        )
        theirs_classes = [name for name in theirs.classes if not name.startswith(".")]
        assert list(ours.classes) == theirs_classes
        assert len(ours) == len(theirs)
        index = open_source("folder", root, split)
        for n, (path, _) in enumerate(theirs.samples):
            assert index.path(n) == path
            np.testing.assert_array_equal(ours.images_NHWC[n], np.asarray(Image.open(path)))
            assert ours.classes[ours.labels_N[n]] in path


def test_val_wins_over_test(make_folder):
    root = make_folder(val="val")
    (root / "test" / "other").mkdir(parents=True)
    assert len(open_split("folder", root, "val")) == 12


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".bmp", ".webp"])
def test_formats(make_folder, suffix):
    assert len(open_split("folder", make_folder(suffix=suffix), "train")) == 12


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_colour_modes_become_rgb(make_folder, mode):
    root = make_folder(suffix=".tif")
    image = Image.new("L", (12, 12), 255).convert(mode)
    image.save(root / "train" / "ant" / "000.tif")
    assert open_split("folder", root).images_NHWC[0].shape == (12, 12, 3)


def test_image_size_resizes_the_short_side_and_cuts_the_centre(make_folder):
    root = make_folder(size=(40, 20))
    images = open_split("folder", root, image_size=10).images_NHWC
    original = Image.open(root / "train" / "ant" / "000.png")
    expected = original.resize((20, 10), Image.Resampling.BILINEAR).crop((5, 0, 15, 10))
    np.testing.assert_array_equal(images[0], np.asarray(expected))


def test_limit_takes_the_same_from_every_class(make_folder):
    root = make_folder(per_class=5)
    small = open_split("folder", root, limit=6)
    np.testing.assert_array_equal(small.labels_N, [0, 0, 1, 1, 2, 2])
    whole = open_split("folder", root)
    np.testing.assert_array_equal(small.images_NHWC, whole.images_NHWC[[0, 1, 5, 6, 10, 11]])


def test_unequal_sizes_need_image_size(make_folder):
    root = make_folder()
    odd = root / "train" / "cow" / "002.png"
    Image.new("RGB", (13, 12)).save(odd)
    with pytest.raises(UserError, match=r"cow/002\.png is 13x12 .* is 12x12; set data.image_size"):
        open_split("folder", root)
    assert open_split("folder", root, image_size=8).images_NHWC.shape == (12, 8, 8, 3)


def test_images_that_are_not_square_need_image_size(make_folder):
    with pytest.raises(UserError, match=r"ant/000\.png is 16x12 pixels; set data.image_size"):
        open_split("folder", make_folder(size=(16, 12)))


def test_empty_class_folder_is_named(make_folder):
    root = make_folder()
    for file in (root / "train" / "bee").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"the class folder .*train/bee holds no image"):
        open_split("folder", root)


def test_class_lists_that_differ_are_listed(make_folder):
    root = make_folder()
    (root / "val" / "cow").rename(root / "val" / "dog")
    with pytest.raises(UserError, match="only in train: cow; only in val: dog"):
        open_split("folder", root)


def test_no_class_folders(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    with pytest.raises(UserError, match=r"train has no class folders; expected .*CLASS/IMAGE"):
        open_split("folder", tmp_path)


def test_missing_split_folder(make_folder):
    root = make_folder()
    (root / "val").rename(root / "other")
    with pytest.raises(UserError, match=r"has train/ but no val/ or test/\. Add one, or set"):
        open_split("folder", root)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_corrupt_image_is_named_and_nothing_is_left_behind(make_folder, own_cache, damage):
    root = make_folder(size=(64, 64), suffix=".jpg")
    bad = root / "train" / "cow" / "001.jpg"
    content = bad.read_bytes()
    bad.write_bytes(
        {"truncated": content[: len(content) // 2], "text": b"hi", "empty": b""}[damage]
    )
    with pytest.raises(UserError, match=f"cannot decode the image {bad}: .*; repair or remove"):
        open_split("folder", root)
    assert [file.suffix for file in own_cache.iterdir()] == [".lock"]


def test_dangling_link_is_named(make_folder):
    root = make_folder()
    (root / "train" / "ant" / "gone.png").symlink_to(root / "nowhere.png")
    with pytest.raises(UserError, match=r"gone\.png is a link to .*nowhere\.png, which is"):
        open_split("folder", root)


def test_validation_may_lack_a_class_and_the_labels_stay_those_of_training(make_folder):
    root = make_folder()
    shutil.rmtree(root / "val" / "bee")
    train, val = (open_source("folder", root, split) for split in ("train", "val"))
    assert val.classes == train.classes == ("ant", "bee", "cow")
    assert set(val.labels_N.tolist()) == {0, 2}
    assert "has no image of 1 of the classes (bee)" in " ".join(val.remarks)
    shutil.rmtree(root / "train" / "ant")
    with pytest.raises(UserError, match="only in val: ant"):
        open_source("folder", root)
