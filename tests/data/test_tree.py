"""What counts as an image of a class, in trees as people and their systems leave them."""

import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastkd.data import FolderIndex, open_source, open_split
from fastkd.data.sources.holdout import Holdout
from fastkd.errors import UserError


def picture(path: Path, level: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", (4, 4), level)
    image.save(path, format="PNG" if path.suffix not in (".jpg", ".gif") else None)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    """train/ and val/ with the classes cat and dog of two images each."""
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            for image in range(2):
                picture(tmp_path / "set" / split / name / f"{image}.png", 100 * number + image)
    return tmp_path / "set"


def listed(index: FolderIndex) -> dict[str, list[str]]:
    """Names of files below the split, by class."""
    files = [os.path.relpath(index.path(n), index.folder) for n in range(len(index))]
    return {
        name: [file for file, own in zip(files, index.labels_N, strict=True) if own == label]
        for label, name in enumerate(index.classes)
    }


@pytest.mark.parametrize("maps", ["labels", "Masks"])
def test_images_and_their_label_maps_are_no_classes(tmp_path, maps) -> None:
    for place in ("train/images", f"train/{maps}", "val/images", f"val/{maps}"):
        for image in range(4):
            picture(tmp_path / place / f"{image}.png")
    told = rf"^{tmp_path}/train has no classes but images/ and {maps}/.* data\.name=pairs data\.im"
    for split in ("train", "val"):
        with pytest.raises(UserError, match=told.replace("/train", f"/{split}")):
            open_source("folder", tmp_path, split)
    with pytest.raises(UserError, match=told):
        open_source("folder", tmp_path / "train", holdout=Holdout(share=0.5, seed=0))
    # Beside another class they may be classes.
    for split in ("train", "val"):
        picture(tmp_path / split / "people" / "1.png")
    assert len(open_source("folder", tmp_path).classes) == 3


PLAIN = {"cat": ["cat/0.png", "cat/1.png"], "dog": ["dog/0.png", "dog/1.png"]}

SYSTEM_FOLDERS = [
    ".ipynb_checkpoints",
    ".thumbnails",
    ".Trash-1000",
    ".git",
    ".AppleDouble",
    "@eaDir",
    "__MACOSX",
    "__pycache__",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
]


@pytest.mark.parametrize("name", SYSTEM_FOLDERS)
@pytest.mark.parametrize("place", [".", "cat", "cat/nested"])
def test_hidden_and_system_folders_hold_no_images_at_any_depth(root, name, place):
    for split in ("train", "val"):
        picture(root / split / place / name / "a.png")
        picture(root / split / place / name / "deeper" / "b.png")
        index = open_source("folder", root, split)
        assert listed(index) == PLAIN and not index.remarks


@pytest.mark.parametrize("name", ["._0.png", ".0.png", "Thumbs.db", "desktop.ini", ".DS_Store"])
def test_system_files_are_left_out_without_a_word(root, name):
    shutil.copy(root / "train" / "cat" / "0.png", root / "train" / "cat" / name)
    index = open_source("folder", root)
    assert listed(index) == PLAIN and not index.remarks


def test_files_that_are_no_images_by_name_are_counted_in_one_line(root):
    for name in ("a.txt", "b.TXT", "c.eps", "README", "d.xml", "e.json", "f.csv", "g.html"):
        (root / "train" / "cat" / name).write_text("x")
    (root / "train" / "dog" / "h.txt").write_text("x")
    picture(root / "train" / "beside.png")
    index = open_source("folder", root)
    assert listed(index) == PLAIN
    (remark,) = index.remarks
    assert remark == (
        "folder/train leaves out 9 files without an image extension (.txt 3, no extension "
        "1, .csv 1, .eps 1, .html 1, ..), 1 image beside the class folders"
    )
    assert not open_source("folder", root, "val").remarks


def test_folders_within_a_class_belong_to_it(root):
    picture(root / "train" / "cat" / "black" / "old" / "2.png")
    picture(root / "train" / "cat" / "x.png" / "3.png")  # a folder with an image's name
    wanted = ["cat/0.png", "cat/1.png", "cat/black/old/2.png", "cat/x.png/3.png"]
    assert listed(open_source("folder", root)) == PLAIN | {"cat": wanted}


@pytest.mark.parametrize(
    "target", [".", "..", "../..", "../../..", "nested", "loop"], ids=lambda target: target
)
def test_loops_of_links_end_and_bring_nothing_in(root, target):
    nested = root / "train" / "cat" / "nested"
    nested.mkdir()
    picture(nested / "2.png")
    (nested / "loop").symlink_to(target)
    (root / "train" / "loop").symlink_to(".")
    assert listed(open_source("folder", root)) == PLAIN | {
        "cat": [*PLAIN["cat"], "cat/nested/2.png"]
    }
    assert listed(open_source("folder", root, "val")) == PLAIN


def test_a_file_reached_by_links_too_is_listed_once_under_its_own_class(root):
    train = root / "train"
    (train / "cat" / "again.png").symlink_to("0.png")
    (train / "cat" / "alias.png").symlink_to(train / "dog" / "1.png")
    (train / "cat" / "all").symlink_to("../dog")
    (train / "cat" / "chain.png").symlink_to("again.png")
    index = open_source("folder", root)
    assert listed(index) == PLAIN
    assert index.remarks == ("folder/train leaves out 4 links to what is listed anyway",)


def test_links_to_files_elsewhere_are_followed_once(root, tmp_path):
    pool = tmp_path / "pool"
    picture(pool / "a.png", 7)
    picture(pool / "more" / "b.png", 8)
    cat = root / "train" / "cat"
    for name in ("2.png", "3.png"):
        (cat / name).symlink_to(pool / "a.png")
    (cat / "4").symlink_to(pool / "more")
    (cat / "5").symlink_to(pool / "more")
    index = open_source("folder", root)
    assert listed(index)["cat"] == [*PLAIN["cat"], "cat/2.png", "cat/4/b.png"]
    assert index.remarks[0].endswith("leaves out 2 links to what is listed anyway")
    np.testing.assert_array_equal(
        open_split("folder", root).images_NHWC[:, 0, 0, 0], [0, 1, 7, 8, 100, 101]
    )


@pytest.mark.parametrize("what", ["a.png", "."])
def test_one_file_cannot_have_two_classes(root, tmp_path, what):
    picture(tmp_path / "pool" / "a.png")
    for name in ("cat", "dog"):
        (root / "train" / name / "link.png").symlink_to(tmp_path / "pool" / what)
    with pytest.raises(UserError, match=r"cat/link.png and .*dog/link.png lead to the same images"):
        open_source("folder", root)


def test_class_folders_may_be_links(root, tmp_path):
    (root / "train" / "cat").rename(tmp_path / "cats")
    (root / "train" / "cat").symlink_to(tmp_path / "cats")
    assert listed(open_source("folder", root)) == PLAIN


@pytest.mark.parametrize("alias", ["ant", "kitty"])
def test_a_class_that_is_a_link_to_another_class_is_refused(root, alias):
    for split in ("train", "val"):
        (root / split / alias).symlink_to("cat")
    with pytest.raises(UserError, match=rf"train/{alias} holds no image .* it is a link to cat"):
        open_source("folder", root)


def test_hard_links_are_files_of_their_own(root):
    os.link(root / "train" / "cat" / "0.png", root / "train" / "cat" / "2.png")
    assert listed(open_source("folder", root))["cat"] == [*PLAIN["cat"], "cat/2.png"]


def test_a_linked_split_is_a_split(root, tmp_path):
    shutil.rmtree(root / "val")
    (root / "val").symlink_to("train")
    assert listed(open_source("folder", root, "val")) == PLAIN
    (tmp_path / "link").symlink_to(root)
    assert listed(open_source("folder", tmp_path / "link")) == PLAIN


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_is_left_out_and_counted(root, monkeypatch, kind):
    place = root / "train" / "cat"
    if kind == "pipe":
        os.mkfifo(place / "2.png")
    elif kind == "socket":
        monkeypatch.chdir(place)
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("2.png")
    else:
        (place / "2.png").symlink_to("/dev/null")
    index = open_source("folder", root)
    assert listed(index) == PLAIN
    assert index.remarks == ("folder/train leaves out 1 pipe, socket or device",)


@pytest.mark.parametrize("target", ["nowhere.png", "2.png"], ids=["dangling", "itself"])
def test_broken_links_are_named_if_they_should_be_images(root, target):
    (root / "train" / "cat" / "notes").symlink_to(target)
    assert listed(open_source("folder", root)) == PLAIN
    (root / "train" / "cat" / "2.png").symlink_to(target)
    with pytest.raises(UserError, match=r"cat/2\.png is a link to \S*\.png, which is not"):
        open_source("folder", root)


@pytest.mark.parametrize("where", ["cat", "cat/nested"])
def test_a_folder_that_cannot_be_read_is_named(root, monkeypatch, where):
    (root / "train" / "cat" / "nested").mkdir()
    closed = root / "train" / where
    real = os.scandir

    def scandir(path="."):
        if os.fspath(path) == os.fspath(closed):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=rf"train/{where} cannot be read: Permission denied"):
        open_source("folder", root)


@pytest.mark.parametrize("name", ["folder", "cifar10"])
@pytest.mark.parametrize("root", ["x" * 5000, "~nobody-of-this-name/set", "a\x1b[31m"])
def test_roots_that_cannot_be_looked_at_are_a_sentence(root, name):
    with pytest.raises(UserError) as error:
        open_source(name, root)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.parametrize("suffixes", [(".jfif", ".jpe"), (".gif", ".JPG"), (".bmp", ".tga")])
def test_every_extension_counts_alike(root, suffixes):
    for number, suffix in enumerate(suffixes):
        old = root / "train" / "cat" / f"{number}.png"
        with Image.open(old) as image:
            kind = {".bmp": "BMP", ".tga": "TGA", ".gif": "GIF"}.get(suffix, "JPEG")
            image.save(old.with_suffix(suffix), format=kind)
        old.unlink()
    index = open_source("folder", root)
    assert listed(index)["cat"] == [f"cat/{n}{suffix}" for n, suffix in enumerate(suffixes)]
    levels = open_split("folder", root).images_NHWC[:, 0, 0, 0].astype(int)
    np.testing.assert_allclose(levels, [0, 1, 100, 101], atol=1)


@pytest.mark.parametrize("name", ["a\nb.png", "a\x1b[2Jb.png", "a\udcff.png", "ä b#,.png", "-.png"])
def test_files_of_any_name_are_read(root, name):
    picture(root / "train" / "cat" / name, 33)
    images = open_split("folder", root)
    assert len(images) == 5 and 33 in images.images_NHWC[images.labels_N == 0]
    (root / "train" / "cat" / name).write_bytes(b"broken")
    with pytest.raises(UserError) as error:
        open_split("folder", root)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("name", "why"),
    [("a\nb", "control"), ("a\x1b[31m", "control"), ("caf\udce9", "not valid UTF-8")],
)
def test_class_names_that_no_file_of_a_run_could_hold_are_refused(root, name, why):
    for split in ("train", "val"):
        picture(root / split / name / "0.png")
    with pytest.raises(
        UserError, match=rf"class folder '.*' in .*train .*{why}.*rename it"
    ) as error:
        open_source("folder", root)
    assert str(error.value).isprintable()


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_accents_spelled_in_other_bytes_are_the_same_class(root):
    picture(root / "train" / COMPOSED / "0.png", 55)
    picture(root / "val" / DECOMPOSED / "0.png", 66)
    for split, level in (("train", 55), ("val", 66)):
        images = open_split("folder", root, split)
        assert images.classes == (COMPOSED, "cat", "dog")
        assert (images.images_NHWC[images.labels_N == 0] == level).all()


def test_two_class_folders_of_one_spelling_are_refused(root):
    for name in (COMPOSED, DECOMPOSED):
        picture(root / "train" / name / "0.png")
    with pytest.raises(UserError, match=r"two class folders of one name, café, .*cafe\\u0301"):
        open_source("folder", root)


@pytest.mark.parametrize("other", ["Cat", "cat ", "c\u200bat", "ca\u00adt"])
def test_classes_that_look_alike_are_two_classes_and_said(root, other):
    for split in ("train", "val"):
        picture(root / split / other / "0.png")
    index = open_source("folder", root)
    assert len(index.classes) == 3
    (remark,) = index.remarks
    assert "classes that differ only in case or unseen characters" in remark
    assert ascii(other) in remark and remark.isprintable()


def test_letters_of_other_scripts_and_accents_do_not_look_alike(root):
    for split in ("train", "val"):
        for name in ("cafe", COMPOSED, "का", "कि", "x2", "x²"):
            picture(root / split / name / "0.png")
    assert not open_source("folder", root).remarks


def test_splits_whose_classes_differ_in_case_only_say_so(root):
    (root / "val" / "cat").rename(root / "val" / "Cat")
    with pytest.raises(UserError, match=r"'cat' and 'Cat' differ only in case"):
        open_source("folder", root)


def test_an_empty_class_says_what_lies_there(root):
    for file in (root / "train" / "cat").iterdir():
        file.rename(file.with_suffix(".webp2"))
    with pytest.raises(
        UserError,
        match=r"train/cat holds no image .*2 files without an image extension \(\.webp2 2",
    ):
        open_source("folder", root)


NAMES = ["a.png", "b.JPG", "c.txt", "d", "._a.png", "Thumbs.db", "e.tif", "f.eps", "g\n.png"]
FOLDERS = ["deep", ".hidden", "@eaDir", "more.png", "__MACOSX", " "]
UNSEEN = ("._a.png", ".hidden", "@eaDir", "__MACOSX")


def grow(random: np.random.Generator, folder: Path, depth: int) -> None:
    """Files and folders of all kinds, at random."""
    folder.mkdir(exist_ok=True)
    for name in random.choice(NAMES, 4, replace=False):
        (folder / str(name)).write_bytes(b"")
    for name in random.choice(FOLDERS, 2, replace=False) if depth else ():
        grow(random, folder / str(name), depth - 1)


def seen(split: Path) -> list[Path]:
    """What lies in a split, is not hidden, and is no link."""
    return [
        place
        for place in sorted(split.rglob("*"))
        if not (set(place.relative_to(split).parts) & set(UNSEEN) or place.is_symlink())
    ]


def plain_images(split: Path) -> list[Path]:
    """The images of a split that are not links."""
    suffixes = (".png", ".jpg", ".tif")
    return [file for file in seen(split) if file.is_file() and file.suffix.lower() in suffixes]


def link(random: np.random.Generator, split: Path, number: int) -> None:
    """Links within a split to its images and folders, which are listed anyway, and to itself."""
    places = [place for place in seen(split) if place.is_dir()]
    targets = [split, split.parent, *places, *plain_images(split)]
    for n in range(number):
        place = places[random.integers(len(places))]
        target = targets[random.integers(len(targets))]
        (place / f"link{n}.png").symlink_to(os.path.relpath(target, place))


@pytest.mark.parametrize("seed", range(40))
def test_random_trees_with_links_give_every_plain_image_once(tmp_path, seed):
    random = np.random.default_rng(seed)
    for split in ("train", "val"):
        for name in ("ant", "bee", "cow"):
            (tmp_path / split).mkdir(exist_ok=True)
            grow(random, tmp_path / split / name, int(random.integers(0, 3)))
            (tmp_path / split / name / "own.png").write_bytes(b"")
        link(random, tmp_path / split, int(random.integers(0, 12)))
    for split in ("train", "val"):
        index = open_source("folder", tmp_path, split)
        files = [index.path(n) for n in range(len(index))]
        assert len(set(files)) == len(files)
        for label, name in enumerate(index.classes):
            own = [file for file, of in zip(files, index.labels_N, strict=True) if of == label]
            plain = plain_images(tmp_path / split)
            assert set(own) == {str(file) for file in plain if f"/{split}/{name}/" in str(file)}
