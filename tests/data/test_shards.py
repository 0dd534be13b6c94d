"""Tar shards: what the folder holds that they were packed from, in its order; shards of others; and
archives that are damaged or hostile."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.data import FolderIndex, open_source
from fastkd.data.sources.listing import listing_of
from fastkd.data.sources.packing import Shrink, pack_split
from fastkd.data.sources.shards import ShardIndex, find_shards
from fastkd.errors import UserError

from .test_torch_loader import assert_same, loader


def opened(root: Path, split: str = "train", **more) -> FolderIndex:
    index = open_source("folder", root, split, **more)
    assert isinstance(index, FolderIndex)
    return index


def packed(root: Path, target: Path, **more) -> Path:
    target.mkdir()
    for split in ("train", "val"):
        pack_split(opened(root, split), target, split, **more)
    (target / "classes.txt").write_text("".join(f"{c}\n" for c in opened(root).classes))
    return target


def picture(number: int, format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes | tarfile.TarInfo]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_hold_what_the_folder_holds(make_folder, tmp_path, with_index):
    root = make_folder(classes=("ä b", "bee", "zoo"), per_class=7, suffix=".jpg", size=(20, 14))
    (root / "train" / "bee" / "deeper").mkdir()
    Image.new("RGB", (9, 11)).save(root / "train" / "bee" / "deeper" / "x.y.png")
    # Small shards: several of them, none for a whole class.
    shards = packed(root, tmp_path / "shards", shard_bytes=8000)
    assert len(find_shards(shards)["train"]) > 2
    if not with_index:
        for split in ("train", "val"):
            (shards / f"{split}.index").unlink()
    for split in ("train", "val"):
        folder, index = opened(root, split), opened(shards, split)
        assert isinstance(index, ShardIndex) and index.classes == folder.classes
        np.testing.assert_array_equal(index.labels_N, folder.labels_N)
        for sample in range(len(folder)):
            with folder.open(sample) as one, index.open(sample) as other:
                assert one.read() == other.read()
            if with_index:
                assert index.file(sample) == folder.file(sample)
        # A run on one can be resumed on the other.
        assert listing_of(index).same(listing_of(folder)) == with_index
    kinds = {"crop": "resized", "image_size": 9}
    assert_same(
        list(loader(opened(root), **kinds).epoch(2)), list(loader(opened(shards), **kinds).epoch(2))
    )
    assert_same(
        list(loader(opened(shards), workers=2, **kinds).epoch(2)),
        list(loader(opened(shards), **kinds).epoch(2)),
    )


def test_a_subset_and_a_split_that_is_held_back_are_those_of_the_folder(make_folder, tmp_path):
    root = make_folder(per_class=9)
    target = packed(root, tmp_path / "shards")
    taken = opened(target, limit=5)
    assert [taken.file(n) for n in range(5)] == [opened(root, limit=5).file(n) for n in range(5)]
    np.testing.assert_array_equal(
        np.asarray(taken.image(3)), np.asarray(opened(root, limit=5).image(3))
    )
    for name in (*find_shards(target)["val"], "val.index"):
        (target / name).unlink()
    (root / "val").rename(root / "else")
    from fastkd.data.sources.holdout import Holdout

    held = Holdout(0.3, seed=4)
    for split in ("train", "val"):
        folder, index = (opened(place, split, holdout=held) for place in (root, target))
        assert [index.file(n) for n in range(len(index))] == [
            folder.file(n) for n in range(len(folder))
        ]
        assert listing_of(index).same(listing_of(folder))
    with pytest.raises(UserError, match=r"none for val.*data\.val_share=0\.1"):
        opened(target)


def test_within_the_shards_the_classes_are_mixed(make_folder, tmp_path):
    target = packed(make_folder(classes=("a", "b"), per_class=40), tmp_path / "shards")
    with tarfile.open(target / "train-000000.tar") as archive:
        labels = [archive.extractfile(m).read() for m in archive if m.name.endswith(".cls")]
    assert len(labels) == 80 and 20 < labels[:60].count(b"0") < 40


def test_pictures_are_made_smaller_once(make_folder, tmp_path):
    root = make_folder(per_class=2, size=(60, 40), suffix=".png")
    Image.new("RGB", (10, 30), "red").save(root / "train" / "ant" / "small.png")
    index = opened(packed(root, tmp_path / "shards", shrink=Shrink(20, quality=95)))
    sizes = {index.image(n).size for n in range(len(index))}
    assert sizes == {(30, 20), (10, 30)}
    assert {index.file(n).rpartition(".")[2] for n in range(len(index))} == {"jpg", "png"}
    with pytest.raises(UserError, match="expected a side from 1 up and a quality from 1 to 95"):
        Shrink(0)


def test_shards_of_others(tmp_path):
    """As Hugging Face's imagenet-1k-wds: names of their own, .json beside .cls, no index."""
    for split, numbers in (("train", range(6)), ("validation", range(6, 9))):
        files: dict[str, bytes] = {}
        for n in numbers:
            key = f"n{n % 3:04d}_{n}"
            files[f"{key}.cls"] = str(n % 3).encode()
            files[f"{key}.jpeg"] = picture(n, "JPEG")
            files[f"{key}.json"] = json.dumps({"label": 99, "width": 8}).encode()
        write_tar(tmp_path / f"set-{split}-00.tar", files)
    train, val = opened(tmp_path), opened(tmp_path, "val")
    assert train.classes == val.classes == ("0", "1", "2")
    assert train.labels_N.tolist() == [0, 0, 1, 1, 2, 2] and val.labels_N.tolist() == [0, 1, 2]
    assert [train.file(n) for n in range(3)] == ["n0000_0.jpeg", "n0000_3.jpeg", "n0001_1.jpeg"]
    expected = Image.open(io.BytesIO(picture(3, "JPEG"))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(train.image(1)), np.asarray(expected))


def test_several_labels(tmp_path):
    for split in ("train", "val"):
        said = [{"present": [0, 2]}, {"present": [], "unknown": [1]}]
        files = {f"{n}.json": json.dumps(one).encode() for n, one in enumerate(said)}
        files |= {f"{n}.png": picture(n) for n in range(2)}
        write_tar(tmp_path / f"{split}-0.tar", files)
    (tmp_path / "classes.txt").write_text("a\nb\nc d\n")
    index = opened(tmp_path)
    assert index.classes == ("a", "b", "c d")
    assert index.labels_N.tolist() == [[1, 0, 1], [0, -1, 0]]
    target = tmp_path / "again"
    target.mkdir()
    pack_split(index, target, "train")
    pack_split(opened(tmp_path, "val"), target, "val")
    (target / "classes.txt").write_text("a\nb\nc d\n")
    for remove in (False, True):
        if remove:
            (target / "train.index").unlink()
        np.testing.assert_array_equal(opened(target).labels_N, index.labels_N)


def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


GOOD = {"a.png": picture(0), "a.cls": b"0"}


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"../a.png": picture(0), "../a.cls": b"0"}, "a path that leads out of it"),
        ({"/etc/a.png": picture(0), "/etc/a.cls": b"0"}, "a path that leads out of it"),
        ({**GOOD, "b.png": link("b.png", tarfile.SYMTYPE, "/etc/passwd")}, "which is a link"),
        ({**GOOD, "b.png": link("b.png", tarfile.LNKTYPE, "a.png")}, "which is a link"),
        (
            {**GOOD, "b.png": link("b.png", tarfile.FIFOTYPE, "")},
            "which is a link or no plain file",
        ),
        ({**GOOD, "a.jpg": picture(1, "JPEG")}, "two pictures of one key, a.png and a.jpg"),
        ({**GOOD, "b.png": picture(1)}, "b.png has no label: expected a member .cls or .json"),
        ({**GOOD, "a.cls": b"ant"}, r"a label that is not understood \(a.cls: ant\)"),
        ({**GOOD, "a.cls": b"-1"}, "expected a class id from 0 up"),
        ({**GOOD, "a.cls": b"1.0"}, "expected a class id from 0 up"),
        ({**GOOD, "a.cls": b"true"}, "expected a class id from 0 up"),
        ({**GOOD, "a.cls": b"9" * 70000}, "has a label of 70000 bytes"),
        ({**GOOD, "a.cls": b"[" * 60000}, "expected a class id from 0 up"),
        ({**GOOD, "a.cls": b"7"}, "has a label 7, and classes.txt names 2 classes"),
        ({**GOOD, "b.png": picture(1), "b.json": b'{"present": [1]}'}, "several classes only"),
        ({"a.txt": b"words"}, "hold no picture"),
    ],
)
def test_what_is_wrong_in_a_shard_is_said(tmp_path, files, sentence):
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}-0.tar", files)
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(UserError, match=sentence):
        opened(tmp_path)


@pytest.mark.parametrize("keep", [100, 600, 1200])
def test_a_shard_that_ends_early_is_named(tmp_path, keep):
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}-0.tar", {"a.png": bytes(2000), "a.cls": b"0"})
    path = tmp_path / "train-0.tar"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"train-0\.tar is no tar file, or is damaged"):
        opened(tmp_path)


def test_an_index_that_does_not_belong_or_is_damaged_is_refused(make_folder, tmp_path):
    target = packed(make_folder(), tmp_path / "shards")
    own = (target / "train.index").read_bytes()
    with open(target / "train-000000.tar", "ab") as stream:
        stream.write(bytes(512))
    with pytest.raises(UserError, match="index of other shards than those beside it; remove it"):
        opened(target)
    for damage in (b"", own[:40], own[:-8], own.replace(b"fastkd shards 1", b"fastkd shards 9")):
        (target / "train.index").write_bytes(damage)
        with pytest.raises(UserError, match=r"train\.index is damaged .*remove it"):
            opened(target)
    (target / "train.index").unlink()
    assert len(opened(target)) == 12


def test_an_index_cannot_point_outside_of_its_shards(make_folder, tmp_path):
    from fastkd.data.sources.shards import _parsed, write_index

    target = packed(make_folder(), tmp_path / "shards")
    packing, shards = _parsed(target / "train.index")
    for column, value in ((0, 1), (0, -1), (1, -5), (1, 1 << 40), (2, 1 << 62)):
        spans_N3 = packing.spans_N3.copy()
        spans_N3[2, column] = value
        write_index(target / "train.index", packing._replace(spans_N3=spans_N3), shards)
        with pytest.raises(UserError, match="damaged"):
            opened(target)
    labels_N = packing.labels_N.copy()
    labels_N[0] = 3
    write_index(target / "train.index", packing._replace(labels_N=labels_N), shards)
    with pytest.raises(UserError, match="damaged"):
        opened(target)


def test_a_shard_that_shrinks_under_a_run_is_named(make_folder, tmp_path):
    target = packed(make_folder(per_class=20), tmp_path / "shards")
    index = opened(target)
    path = target / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:2000])
    last = int(index.spans_N3[:, 1].argmax())
    with pytest.raises(UserError, match=r"train-000000\.tar ends early"):
        index.image(last)


def test_the_command_packs_and_checks(make_folder, tmp_path, command):
    root, target = make_folder(per_class=5), tmp_path / "shards"
    said = command("data", "pack", str(root), "--out", str(target))
    assert said.code == 0, said.err
    assert "folder/train: 15 images" in said.out
    assert f"data.name=folder data.root={target}" in said.out
    names = sorted(one.name for one in target.iterdir())
    shards = ["train-000000.tar", "train.index", "val-000000.tar", "val.index"]
    assert names == ["classes.txt", *shards]
    checked = command("data", "check", str(target))
    assert checked.code == 0 and "every file is read" in checked.out
    again = command("data", "pack", str(root), "--out", str(target))
    assert again.code == 2 and "is not an empty folder; choose another --out" in again.err
    for words, sentence in (
        ([], "needs --out SHARDS"),
        (["--out", "x", "--json"], "--json is for `fastkd data check`"),
        (["--out", "x", "--quality", "80"], "add it, or leave it out"),
        (["--out", "x", "--shrink", "0"], "expected a side from 1 up"),
    ):
        said = command("data", "pack", str(root), *words)
        assert said.code == 2 and sentence in said.err
    assert (
        "--out is for `fastkd data pack`" in command("data", "check", str(root), "--out", "x").err
    )


def test_packing_twice_gives_the_same_bytes(make_folder, tmp_path):
    root = make_folder(per_class=6)
    first, second = (packed(root, tmp_path / name) for name in ("one", "two"))
    for one in first.iterdir():
        assert one.read_bytes() == (second / one.name).read_bytes()


def test_a_training_on_shards_is_the_training_on_the_folder(make_folder, tmp_path):
    root = make_folder(per_class=10, size=(24, 18))
    target = packed(root, tmp_path / "shards")
    for workers in (0, 1):
        batches = [
            list(loader(opened(place), workers=workers, image_size=12).epoch(1))
            for place in (root, target)
        ]
        assert_same(*batches)
        assert all(torch.isfinite(batch.images_NCHW).all() for batch in batches[0])


def test_folders_win_over_archives_beside_them(make_folder, tmp_path):
    root = make_folder()
    write_tar(root / "ILSVRC2012_img_train.tar", {"n01440764.tar": b"no picture"})
    assert not isinstance(opened(root), ShardIndex)


def test_validation_wins_over_test_and_one_word_says_the_split(tmp_path):
    for name in ("x-train-0.tar", "x-val-0.tar", "my-test_test.tar"):
        write_tar(tmp_path / name, GOOD)
    assert opened(tmp_path, "val").shards == ("x-val-0.tar",)
    (tmp_path / "x-val-0.tar").unlink()
    assert opened(tmp_path, "val").shards == ("my-test_test.tar",)
    write_tar(tmp_path / "test-train-1.tar", GOOD)
    with pytest.raises(UserError, match="says test and train; rename it"):
        opened(tmp_path)


@pytest.mark.parametrize("place", [4, 6])
def test_a_header_that_is_damaged_does_not_end_the_list(tmp_path, place):
    for split in ("train", "val"):
        files = {
            f"{n}.{end}": picture(n) if end == "png" else b"0"
            for n in range(4)
            for end in ("png", "cls")
        }
        write_tar(tmp_path / f"{split}-0.tar", files)
    path = tmp_path / "train-0.tar"
    with tarfile.open(path) as archive:
        header = archive.getmembers()[place].offset
    content = bytearray(path.read_bytes())
    content[header + 150] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(
        UserError, match=f"is no tar file, or is damaged: no header at byte {header}"
    ):
        opened(tmp_path)
    # One that is cut within a header.
    path.write_bytes(bytes(content[: header + 100]))
    with pytest.raises(UserError, match="is no tar file, or is damaged"):
        opened(tmp_path)


def test_a_pack_that_fails_leaves_nothing(make_folder, tmp_path, command):
    root, target = make_folder(size=(40, 40)), tmp_path / "shards"
    (root / "val" / "ant" / "000.png").write_bytes(b"")
    said = command("data", "pack", str(root), "--out", str(target), "--shrink", "16")
    assert said.code == 2 and "000.png" in said.err
    assert [one.name for one in tmp_path.iterdir() if "shards" in one.name] == []
    # Without --shrink no picture is decoded.
    assert command("data", "pack", str(root), "--out", str(target)).code == 0


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("crane\ncrane\n", "line 2: the class 'crane' appears twice"),
        ("ant\n\nbee\n", "line 2: the class '' is empty"),
        ("a\x07\nb\n", "has control characters"),
    ],
)
def test_names_of_classes_are_checked(tmp_path, names, sentence):
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}-0.tar", GOOD)
    (tmp_path / "classes.txt").write_text(names)
    with pytest.raises(UserError, match=sentence):
        opened(tmp_path)


def test_names_of_classes_may_come_later_and_change(tmp_path):
    """The index that was made without them is no reason to ignore them."""
    write_tar(tmp_path / "train-0.tar", {**GOOD, "b.png": picture(1), "b.cls": b"1"})
    write_tar(tmp_path / "val-0.tar", GOOD)
    assert opened(tmp_path, "val").classes == ("0",)
    (tmp_path / "classes.txt").write_text("ant\nbee\n\n")
    assert opened(tmp_path).classes == opened(tmp_path, "val").classes == ("ant", "bee")
    assert "has no image of 1 of the classes (bee)" in " ".join(opened(tmp_path, "val").remarks)
    target = packed(tmp_path, tmp_path / "packed")
    (target / "classes.txt").write_text("Ameise\nBiene\n")
    assert opened(target).classes == ("Ameise", "Biene")
    (target / "classes.txt").write_text("Ameise\n")
    with pytest.raises(UserError, match="names 1 classes, and the shards beside it have 2"):
        opened(target)


def test_into_the_folder_where_the_user_is(make_folder, tmp_path, command, monkeypatch):
    root, target = make_folder(), tmp_path / "here"
    target.mkdir()
    monkeypatch.chdir(target)
    assert command("data", "pack", str(root), "--out", ".").code == 0
    assert len(opened(Path("."))) == 12
    assert (target / "train.index").stat().st_mode == (target / "classes.txt").stat().st_mode


def test_class_folders_win_too_and_nameless_shards_are_said(make_folder, tmp_path):
    root = make_folder() / "train"
    write_tar(root / "train.tar", GOOD)
    from fastkd.data.sources.holdout import Holdout

    assert not isinstance(opened(root, holdout=Holdout(0.3)), ShardIndex)
    write_tar(tmp_path / "plain" / "000000.tar", GOOD)
    with pytest.raises(UserError, match="names do not say train, val or test; rename them"):
        opened(tmp_path / "plain")
