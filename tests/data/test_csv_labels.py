"""data.labels: a CSV file that says what the images show, and what is wrong in one."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from fastkd.data import FolderIndex, open_source
from fastkd.data.config import DataConfig
from fastkd.data.sources.holdout import Holdout
from fastkd.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve pictures in one folder, some names with spaces and accents."""
    folder = tmp_path / "photos" / "all"
    folder.mkdir(parents=True)
    for number in range(12):
        name = f"ä {number}.png" if number % 3 == 0 else f"{number}.png"
        Image.new("RGB", (9, 9), (20 * number, 0, 0)).save(folder / name)
    return tmp_path / "photos"


NAMES = ("ant", "crow")


def name_of(number: int) -> str:
    return f"all/ä {number}.png" if number % 3 == 0 else f"all/{number}.png"


def table(root: Path, lines: list[str], header: str = "path,label,split") -> str:
    file = root.parent / "labels.csv"
    file.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return str(file)


def opened(root: Path, labels: str, split: str = "train", **more) -> FolderIndex:
    index = open_source("folder", root, split, labels=labels, **more)
    assert isinstance(index, FolderIndex)
    return index


def test_one_label_an_image(root):
    rows = [f"{name_of(n)},{NAMES[n % 2]},{'train' if n < 8 else 'Val'}" for n in range(12)]
    labels = table(root, rows)
    train, val = opened(root, labels), opened(root, labels, "val")
    assert train.classes == val.classes == ("ant", "crow")
    assert train.labels_N.tolist() == [0, 1] * 4 and val.labels_N.tolist() == [0, 1] * 2
    assert [train.file(n) for n in range(3)] == [name_of(n) for n in range(3)]
    assert np.asarray(val.image(1))[0, 0, 0] == 180


def test_columns_in_any_order_numbers_and_absolute_paths(root):
    header = "Split,ignored,TARGET, filename"
    rows = [f"train,x,{10 - n},{root / name_of(n)}" for n in range(4)]
    rows += [f'test,"a,b",10,"{name_of(5)}"', f"test,,7,{name_of(6)}"]
    labels = table(root, rows, header)
    train, val = opened(root, labels), opened(root, labels, "val")
    # Sorted as numbers: 7, 8, 9, 10.
    assert train.classes == ("7", "8", "9", "10")
    assert train.labels_N.tolist() == [3, 2, 1, 0] and val.labels_N.tolist() == [3, 0]
    assert train.file(0) == name_of(0)


def test_several_labels(root):
    rows = [f"{name_of(0)},a|c,train", f"{name_of(1)},,train", f"{name_of(2)}, c ,val"]
    labels = table(root, [*rows, f"{name_of(3)},b,train"], "path,labels,split")
    assert opened(root, labels).labels_N.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert opened(root, labels, "val").labels_N.tolist() == [[0, 0, 1]]
    held = table(root, [f"{name_of(n)},a|{'bc'[n % 2]}" for n in range(12)], "path,labels")
    parts = [opened(root, held, split, holdout=Holdout(0.25)) for split in ("train", "val")]
    assert sorted(map(len, parts)) == [3, 9]
    assert parts[0].labels_N.dtype == np.float32 and parts[0].classes == ("a", "b", "c")


def test_without_splits_a_share_is_held_back(root):
    labels = table(root, [f"{name_of(n)},{n % 2}" for n in range(12)], "path,label")
    parts = [opened(root, labels, split, holdout=Holdout(0.3)) for split in ("train", "val")]
    assert [len(part) for part in parts] == [8, 4]
    names = [{part.file(n) for n in range(len(part))} for part in parts]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 12
    with pytest.raises(UserError, match=r"no column `split`.*data\.val_share=0\.1"):
        opened(root, labels)


def test_labels_are_part_of_what_a_run_remembers(root):
    rows = [f"{name_of(n)},{n % 2},{'train' if n < 8 else 'val'}" for n in range(12)]
    before = opened(root, table(root, rows))
    rows[0] = f"{name_of(0)},1,train"
    after = opened(root, table(root, rows))
    assert before.sizes != after.sizes and before.listing != after.listing


GOOD = ["all/1.png,a,train", "all/2.png,a,val"]


@pytest.mark.parametrize(
    ("header", "rows", "sentence"),
    [
        ("name,label,split", GOOD, r"has the columns name, label, split; expected one called path"),
        ("path,file,label", GOOD, "expected one called path .* found more than one"),
        ("path,what,split", GOOD, "expected one of `label` .* and `labels`"),
        ("path,label,labels", GOOD, "expected one of `label` .* and `labels`"),
        ("path,label,split", ["all/1.png,a"], "entry 2: 2 cells, expected 3"),
        ("path,label,split", [*GOOD, "all/1.png,b,val"], r"lists all/1\.png twice"),
        ("path,label,split", [*GOOD, "all/../all/1.png,b,val"], r"lists all/1\.png twice"),
        ("path,label,split", [*GOOD, "all/4.png,,val"], "entry 4: the label is empty"),
        (
            "path,label,split",
            [*GOOD, "all/4.png,a,later"],
            "the split is later; expected train, val",
        ),
        ("path,label,split", [*GOOD, "../x.png,a,val"], r"is not below data\.root"),
        ("path,label,split", [*GOOD, "/etc/passwd,a,val"], r"is not below data\.root"),
        ("path,label,split", [*GOOD, ",a,val"], r"is not below data\.root"),
        ("path,label,split", [*GOOD, "all,a,train"], "listed as an image and is no file"),
        ("path,label,split", [*GOOD, "all/99.png,a,train"], r"1 of 2 listed images are not below"),
        ("path,labels,split", ["all/1.png,a|b|a,train"], r"a label appears twice in a\|b\|a"),
        ("path,label,split", ["all/1.png,a,train"], "lists no image for val"),
        ("path,label,split", [], "lists no image"),
        ("path,label,split", ['all/1.png,"a,train'], "is no CSV file in UTF-8"),
        ("path,label,split", ["all/1.png,a,train", "all/2.png,b,val"], "image for training: b"),
        ("path,label,split", ["all/1.png,a,train", "a\0b.png,a,val"], "has a zero byte"),
        ("path,label,split", ["all/1.png,a\x07,train"], "has control characters; rename it"),
    ],
)
def test_what_is_wrong_is_said(root, header, rows, sentence):
    labels = table(root, rows, header)
    split = "val" if sentence.endswith("for val") else "train"
    with pytest.raises(UserError, match=sentence):
        opened(root, labels, split)


def test_a_file_that_is_not_there_or_no_text(root, tmp_path):
    with pytest.raises(UserError, match=r"none\.csv"):
        opened(root, str(tmp_path / "none.csv"))
    (tmp_path / "bytes.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    with pytest.raises(UserError, match="is no CSV file in UTF-8"):
        opened(root, str(tmp_path / "bytes.csv"))


def test_it_is_for_folders():
    with pytest.raises(ValidationError, match=r"data\.labels=x\.csv is for data\.name=folder"):
        DataConfig(name="cub200", labels="x.csv")


def test_the_command_reads_it(root, command):
    labels = table(root, [f"{name_of(n)},{n % 2},{'train' if n < 8 else 'val'}" for n in range(12)])
    said = command("data", "check", str(root), f"data.labels={labels}")
    assert said.code == 0, said.err
    assert "folder/train: 8 images of 2 classes" in said.out


def test_a_spelling_is_one_class_and_lookalikes_are_said(root):
    words = ["u\u0308", "\u00fc", "Ant", "ant", "7" * 5000, "8"]
    labels = table(
        root,
        [f"{name_of(n)},{word},train" for n, word in enumerate(words)] + [f"{name_of(8)},ant,val"],
    )
    train = opened(root, labels)
    assert train.labels_N[0] == train.labels_N[1] and len(train.classes) == 5
    assert "differ only in case" in " ".join(train.remarks)
    assert "has no image of 4 of the classes" in " ".join(opened(root, labels, "val").remarks)


def test_names_with_leading_dots_and_spaces(root):
    for name in ("..dots.png", " lead.png"):
        Image.new("RGB", (5, 5)).save(root / name)
    labels = table(root, ["..dots.png, a, train", '" lead.png", a, val'], "path, label, split")
    assert opened(root, labels).file(0) == "..dots.png"
    assert opened(root, labels, "val").file(0) == " lead.png"
