"""data.on_bad=skip: which image takes the place of one that cannot be read, on every backend, rank
and in every epoch; what is counted; and that an evaluation leaves it out."""

import errno
import json
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data import FolderIndex, ResidentLoader, TorchLoader, open_data, open_source
from fastkd.data.batch import NO_LABEL
from fastkd.data.config import AppearanceConfig, DataConfig
from fastkd.data.finish import Look
from fastkd.data.loaders.streaming import StreamingLoader
from fastkd.data.picture_views import PictureView
from fastkd.data.policies.policy import make_policy
from fastkd.data.sources.by_name import decode_source
from fastkd.errors import FastKDError, UserError
from fastkd.evaluation.evaluate import evaluate
from fastkd.storage.facts import Framing
from fastkd.training.unread import Unread

from .test_torch_loader import loading

NUM = 24
BAD = {3: "empty", 4: "truncated", 23: "words"}
STANDS_IN = {3: 5, 4: 5, 23: 0}


@pytest.fixture
def root(make_folder) -> Path:
    """24 JPEGs of 3 classes in train and in val, of which the ids 3, 4 and 23 cannot be read."""
    root = make_folder(per_class=8, suffix=".jpg", size=(40, 30))
    for split in ("train", "val"):
        index = open_source("folder", root, split)
        assert isinstance(index, FolderIndex)
        for sample, kind in BAD.items():
            file = Path(index.path(sample))
            content = {"empty": b"", "truncated": file.read_bytes()[:400], "words": b"no image"}
            file.write_bytes(content[kind])
    return root


def backends() -> list[str]:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return ["resident", "torch", "workers"]
    return ["resident", "torch", "workers", "dali"]


def opened(root: Path, backend: str, split: str = "train", **changes):
    source = open_source("folder", root, split)
    chosen = loading(train=split == "train", **changes)
    if backend == "resident":
        return ResidentLoader(decode_source(source, Framing.whole(12), skips=True), chosen)
    kind: type[StreamingLoader] = TorchLoader
    if backend == "dali":
        from fastkd.data.loaders.dali_loader import DaliLoader

        kind = DaliLoader
    workers = 2 if backend == "workers" else 0
    return kind(source, chosen, image_size=12, crop="pad", workers=workers, skips=True)


@pytest.mark.parametrize("backend", backends())
def test_the_next_image_takes_its_place_in_every_epoch(root, backend):
    data = opened(root, backend)
    for epoch in (0, 1, 2):
        shown: list[int] = []
        unread: list[int] = []
        for batch in data.epoch(epoch):
            assert len(batch.images_NCHW) == 5  # batches keep their size
            labels = batch.index_N // 8
            assert torch.equal(batch.labels_N, labels)
            shown += batch.index_N.tolist()
            unread += [sample for sample, _ in batch.unread]
            assert all("image" in reason for _, reason in batch.unread)
        planned = data.plan.order(epoch)[:20].tolist()
        assert shown == [STANDS_IN.get(sample, sample) for sample in planned]
        assert sorted(unread) == sorted(sample for sample in planned if sample in BAD)


@pytest.mark.parametrize("backend", backends())
def test_an_epoch_that_comes_again_is_the_same(root, backend):
    """Also after another one was left in its middle, and from its own middle on."""
    look = Look(make_policy("trivial"), 0.5)
    views = PictureView("cropflip", 2)
    again = opened(root, backend, look=look).with_views(views)
    for epoch, start, steps in ((0, 0, 4), (1, 0, 2), (0, 0, 4), (1, 1, 3), (2, 3, 1), (0, 2, 2)):
        once = opened(root, backend, look=look).with_views(views)
        shown = list(islice(again.epoch(epoch, start), steps))
        for one, other in zip(shown, islice(once.epoch(epoch, start), steps), strict=True):
            assert torch.equal(one.images_NCHW, other.images_NCHW)
            assert torch.equal(one.second_NCHW, other.second_NCHW)
            assert torch.equal(one.index_N, other.index_N)
            assert one.unread == other.unread


@pytest.mark.parametrize("backend", backends())
def test_a_stand_in_looks_as_it_does_in_its_own_row(root, backend):
    data = opened(root, backend, drop_last=False, batch_size=24)
    (batch,) = data.epoch(1)
    rows = {sample: batch.images_NCHW[batch.index_N == sample] for sample in (5, 0)}
    assert [len(each) for each in rows.values()] == [3, 2]
    for each in rows.values():
        assert all(torch.equal(each[0], other) for other in each)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_show_what_one_process_shows(root, backend, ranks):
    (whole,) = opened(root, backend, batch_size=24, drop_last=False).epoch(4)
    parts = [
        next(
            opened(
                root, backend, batch_size=24, drop_last=False, rank=rank, world_size=ranks
            ).epoch(4)
        )
        for rank in range(ranks)
    ]
    assert torch.equal(torch.cat([part.index_N for part in parts]), whole.index_N)
    assert torch.equal(torch.cat([part.images_NCHW for part in parts]), whole.images_NCHW)


@pytest.mark.parametrize("backend", backends())
def test_the_evaluation_leaves_them_out(root, backend):
    data = opened(root, backend, "val")
    for _ in range(2):
        batches = list(data.epoch(0))
        labels = torch.cat([batch.labels_N for batch in batches])
        assert torch.cat([batch.index_N for batch in batches]).tolist() == list(range(NUM))
        assert [n for n in range(NUM) if labels[n] == NO_LABEL] == sorted(BAD)
        assert sum(len(batch.unread) for batch in batches) == len(BAD)
    world = World(0, 0, 1, torch.device("cpu"), None)
    found = evaluate(lambda x: x.mean((2, 3)), data, Precision("fp32", "cpu"), world)
    assert found["samples"] == NUM - len(BAD) and found["unread"] == len(BAD)
    # The labels of the data set itself stay what they are.
    assert data.labels_N.tolist() == [n // 8 for n in range(NUM)]


def test_by_default_the_first_one_ends_it(root):
    source = open_source("folder", root)
    with pytest.raises(UserError, match="empty"):
        decode_source(source, Framing.whole(12))
    # Also from a cache that was built while they were skipped.
    decode_source(source, Framing.whole(12), skips=True)
    with pytest.raises(UserError, match="empty"):
        decode_source(source, Framing.whole(12))
    assert set(decode_source(source, Framing.whole(12), skips=True).unread) == set(BAD)
    with pytest.raises(UserError, match="cannot"):
        list(TorchLoader(source, loading(), image_size=12, crop="pad").epoch(0))


def test_nothing_can_be_read(root):
    source = open_source("folder", root)
    for sample in range(NUM):
        Path(source.path(sample)).write_bytes(b"")
    with pytest.raises(UserError, match="none of its images can be read"):
        decode_source(source, Framing.whole(12), skips=True)
    data = TorchLoader(source, loading(), image_size=12, crop="pad", skips=True)
    with pytest.raises(UserError, match=r"24 images in a row cannot be read, the last .* is empty"):
        list(data.epoch(0))


@pytest.mark.parametrize(
    ("backend", "more"),
    [("resident", ()), ("torch", ()), ("torch", ("augment.cycle=1", "data.workers=2"))],
)
def test_a_run_counts_them_and_names_them(root, command, tmp_path, monkeypatch, backend, more):
    monkeypatch.chdir(tmp_path)
    words = [
        "train",
        "quickstart",
        "data.name=folder",
        f"data.root={root}",
        "data.image_size=12",
        f"data.backend={backend}",
        "data.workers=0",
        "epochs=2",
        "batch_size=8",
        "teacher=null",
        "losses.kd=null",
        "losses.ce.weight=1",
        "baseline.lrs=",
        "student.width=null",
        "student.name=resnet8",
        "device=cpu",
        "compile=off",
        "precision=fp32",
        "out=run",
        "augment.padding=0",
        "augment.crop=none",
        *more,
    ]
    refused = command(*words)
    assert refused.code == 2 and "empty" in refused.err
    said = command(*words, "data.on_bad=skip")
    assert said.code == 0, said.err
    assert said.out.count("another image is shown for one that cannot be read") == 3
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["unread"] for row in rows] == [3, 3]
    assert [row["val_unread"] for row in rows] == [3, 3]
    assert json.loads(Path("run/summary.json").read_text())["unread_images"] == 3
    assert "images not read 3" in said.out


def test_other_bad_files_are_skipped_too(root):
    """As `fastkd data check` finds them: too large, a kind that is not opened, no file at all."""
    folder = root / "train" / "ant"
    Image.new("RGB", (9, 9)).save(folder / "000.eps")
    (folder / "000.eps").rename(folder / "000.jpg")
    (folder / "001.jpg").unlink()
    (folder / "001.jpg").symlink_to(root / "pipe")
    (root / "pipe").write_bytes(b"\xff\xd8\xff\xe0 broken")
    data = opened(root, "torch", batch_size=24, drop_last=False)
    (batch,) = data.epoch(0)
    assert {sample for sample, _ in batch.unread} == {0, 1, *BAD}


def spoil(index: FolderIndex, sample: int) -> bytes:
    """Empty the file of an image; what it held."""
    file = Path(index.path(sample))
    content = file.read_bytes()
    file.write_bytes(b"")
    return content


@pytest.mark.parametrize("backend", ["resident", "torch"])
@pytest.mark.parametrize("size", [None, 20])
def test_the_very_first_image_may_be_bad(make_folder, backend, size):
    """It is what tells the size of the pictures, and how they are framed."""
    root = make_folder(per_class=4, size=(16, 16), suffix=".png")
    source = open_source("folder", root)
    assert isinstance(source, FolderIndex)
    spoil(source, 0)
    data = DataConfig(
        name="folder", root=str(root), image_size=size, backend=backend, workers=0, on_bad="skip"
    )
    placement = Placement(World(0, 0, 1, torch.device("cpu"), None), Precision("fp32", "cpu"))
    pair = open_data(data, AppearanceConfig(), batch_size=6, seed=0, placement=placement)
    assert pair.facts.image_shape == (3, size or 16, size or 16)
    shown = [n for batch in pair.train.epoch(0) for n in batch.index_N.tolist()]
    assert 0 not in shown and len(shown) == 12
    assert pair.remembered.train.images == 12


def test_a_file_that_was_repaired_is_shown_again(root):
    source = open_source("folder", root)
    assert isinstance(source, FolderIndex)
    content = spoil(source, 7)
    state = Path(source.path(7)).stat()
    assert 7 in decode_source(source, Framing.whole(12), skips=True).unread
    # The same size and time, so only another look finds out.
    Path(source.path(7)).write_bytes(content)
    os.utime(source.path(7), ns=(state.st_atime_ns, state.st_mtime_ns))
    again = decode_source(source, Framing.whole(12), skips=True)
    assert set(again.unread) == set(BAD)
    assert again.images_NHWC[7].any()


def test_an_evaluation_with_several_labels(root):
    folder = open_source("folder", root, "val")
    assert isinstance(folder, FolderIndex)
    labels_NC = np.eye(3, dtype=np.float32)[folder.labels_N]
    data = TorchLoader(
        replace(folder, labels_N=labels_NC),
        loading(train=False),
        image_size=12,
        crop="none",
        skips=True,
    )
    world = World(0, 0, 1, torch.device("cpu"), None)
    known = {n for n in range(NUM) if n not in BAD}
    found = evaluate(lambda x: x.mean((2, 3)), data, Precision("fp32", "cpu"), world, "multi")
    assert found["samples"] == len(known) and found["unread"] == len(BAD)
    for batch in data.epoch(0):
        for sample, row in zip(batch.index_N.tolist(), batch.labels_N, strict=True):
            assert (row == -1).all() if sample in BAD else row.sum() == 1


def test_a_machine_that_opens_no_more_files_is_no_bad_image(root, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    data = opened(root, "torch")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(FastKDError, match="Too many open files"):
        list(data.epoch(0))


def test_only_the_first_ones_are_named():
    counted, said = Unread(), []
    world = World(0, 0, 1, torch.device("cpu"), None)
    console = SimpleNamespace(note=said.append)
    for _ in range(2):
        for first in (0, 5):
            counted.count(tuple((first + n, f"file {first + n}") for n in range(5)))
        assert counted.end_epoch(world, console) == 10
    assert [one.rpartition(" ")[2] for one in said] == ["0", "1", "2"]
