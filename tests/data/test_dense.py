"""Loaders of images with label maps: both backends, ranks, workers, and the whole evaluation."""

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import fastkd.data.loaders.open
from fastkd.data import open_data
from fastkd.data.batch import NO_LABEL
from fastkd.data.config import AppearanceConfig, DataConfig
from fastkd.data.draws import epoch_order
from fastkd.data.loaders.dense import ResidentDense, TorchDense
from fastkd.data.loaders.dense_pair import strided
from fastkd.data.loaders.sized_plan import starts_of
from fastkd.data.sources.joint_cuts import at_stride
from fastkd.data.sources.label_maps import LabelMaps
from fastkd.errors import UserError
from fastkd.evaluation.confusion import confused

from .label_map_sets import label_map, make_camvid, make_pairs, make_voc
from .test_open_data import opened

SIZES = ((40, 30), (40, 30), (30, 40), (52, 30), (52, 30), (52, 30), (40, 30))


def batches(pair: Any, epoch: int = 1, start_step: int = 0) -> list[Any]:
    return list(pair.train.epoch(epoch, start_step))


def assert_same(first: Any, second: Any) -> None:
    assert torch.equal(first.images_NCHW, second.images_NCHW)
    assert torch.equal(first.labels_N, second.labels_N)
    assert torch.equal(first.index_N, second.index_N)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"crop": "pad", "padding": 2, "flip": True},
        {"crop": "pad", "padding": 3, "flip": True, "window": (16, 24)},
        {"flip": True, "window": (64, 56), "label_stride": 4},
        {"image_size": 18, "crop": "pad", "padding": 2, "label_stride": 8},
        {"image_size": 45, "multiple": 1, "flip": True, "policy": "3augment"},
        {"crop": "pad", "padding": 2, "flip": True, "repeats": 2},
    ],
    ids=lambda keys: ",".join(keys) or "plain",
)
def test_both_backends_give_the_same_bytes(tmp_path, keys):
    root = str(make_camvid(tmp_path))
    of_both = [
        opened(name="camvid", root=root, batch_size=2, seed=5, backend=backend, workers=0, **keys)
        for backend in ("resident", "torch")
    ]
    resident, torchs = of_both
    assert isinstance(resident.train, ResidentDense) and isinstance(torchs.train, TorchDense)
    for ours, theirs in zip(batches(resident), batches(torchs), strict=True):
        assert_same(ours, theirs)
        channels, *size = resident.facts.image_shape
        assert ours.images_NCHW.shape == (2, channels, *size)
        assert ours.labels_N.dtype == torch.int64
        assert tuple(ours.labels_N.shape[1:]) == resident.facts.label_size
    for ours, theirs in zip(resident.val.epoch(0), torchs.val.epoch(0), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("backend", ["resident", "torch"])
def test_another_stride_shares_what_was_opened(tmp_path, backend, monkeypatch):
    keys = {"name": "camvid", "root": str(make_camvid(tmp_path)), "batch_size": 2, "workers": 0}
    fresh = opened(**keys, backend=backend, label_stride=4)
    expected = [*batches(fresh), *fresh.val.epoch(0)]
    whole = opened(**keys, backend=backend)
    before = batches(whole)
    # No header is read again, and of resident images no pixel.
    for read in ("check_size", "pair") if backend == "resident" else ("check_size",):
        monkeypatch.setattr(LabelMaps, read, lambda *_: pytest.fail("a file is read again"))
    again = strided(whole, 4)
    assert again.facts.label_size == fresh.facts.label_size
    assert again.remembered is whole.remembered
    for ours, theirs in zip([*batches(again), *again.val.epoch(0)], expected, strict=True):
        assert_same(ours, theirs)
    # And the whole one is what it was.
    for ours, theirs in zip(batches(whole), before, strict=True):
        assert_same(ours, theirs)


def test_a_batch_is_the_cut_of_its_files(tmp_path):
    keys = {"crop": "pad", "padding": 2, "flip": True, "scale": (0.6, 1.7), "label_stride": 2}
    root = str(make_camvid(tmp_path))
    pair = opened(name="camvid", root=root, batch_size=3, seed=9, workers=0, **keys)
    assert pair.backend == "torch" and "augment.scale" in pair.why
    order, (train, _) = epoch_order(9, 4, 6), pair.sources
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in pair.facts.normalization)
    for step, batch in enumerate(batches(pair, epoch=4)):
        ids = order[3 * step : 3 * step + 3]
        assert batch.index_N.tolist() == ids.tolist()
        cuts = pair.train._view.cuts([(40, 30)] * 3, ids, 4)
        for row, (id, cut) in enumerate(zip(ids.tolist(), cuts, strict=True)):
            pixels = torch.from_numpy(cut.of_image(train.image(id))).permute(2, 0, 1)
            torch.testing.assert_close(batch.images_NCHW[row], (pixels / 255 - mean) / std)
            labels_HW = at_stride(cut.of_labels(train.label_map(id)), 2).astype(np.int64)
            labels_HW[labels_HW == 255] = NO_LABEL
            np.testing.assert_array_equal(batch.labels_N[row].numpy(), labels_HW)
    assert len({cut.resized for cut in cuts}) > 1


def test_photometric_policies_leave_labels_alone(tmp_path):
    root = str(make_camvid(tmp_path))
    plain, changed = (
        opened(name="camvid", root=root, batch_size=6, seed=2, flip=True, policy=policy)
        for policy in ("none", "3augment")
    )
    (before,), (after,) = batches(plain), batches(changed)
    assert torch.equal(before.labels_N, after.labels_N)
    assert not torch.equal(before.images_NCHW, after.images_NCHW)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_ranks_and_the_middle_of_an_epoch_change_nothing(tmp_path, workers):
    root = str(make_camvid(tmp_path, sizes=((40, 30),) * 11))
    keys = {
        "name": "camvid",
        "root": root,
        "batch_size": 5,
        "seed": 3,
        "backend": "torch",
        "crop": "pad",
        "padding": 2,
        "flip": True,
        "scale": (0.5, 2.0),
        "drop_last": False,
    }
    alone = batches(opened(**keys, workers=1), epoch=2)
    assert [len(batch.labels_N) for batch in alone] == [5, 5, 1]
    pair = opened(**keys, workers=workers)
    for ours, theirs in zip(batches(pair, epoch=2), alone, strict=True):
        assert_same(ours, theirs)
    for ours, theirs in zip(batches(pair, epoch=2, start_step=1), alone[1:], strict=True):
        assert_same(ours, theirs)


def rank_of(root: str, rank: int, world_size: int, **keys: Any) -> Any:
    from fastkd.compute.placement import Placement
    from fastkd.compute.precision import Precision
    from fastkd.compute.ranks import World

    world = World(rank, rank, world_size, torch.device("cpu"), None)
    data = {key: keys.pop(key) for key in DataConfig.model_fields if key in keys}
    return open_data(
        DataConfig(name="camvid", root=root, workers=0, **data),
        AppearanceConfig(**({"crop": "pad", "padding": 2} | keys)),
        batch_size=4,
        seed=1,
        placement=Placement(world, Precision("fp32", "cpu")),
    )


@pytest.mark.parametrize("backend", ["resident", "torch"])
def test_the_ranks_batches_make_up_the_batch_of_one(tmp_path, backend):
    root = str(make_camvid(tmp_path, sizes=((40, 30),) * 9))
    whole = batches(rank_of(root, 0, 1, backend=backend))
    parts = [batches(rank_of(root, rank, 3, backend=backend)) for rank in range(3)]
    for batch, *rows in zip(whole, *parts, strict=True):
        assert torch.equal(batch.images_NCHW, torch.cat([one.images_NCHW for one in rows]))
        assert torch.equal(batch.labels_N, torch.cat([one.labels_N for one in rows]))
        assert {one.global_size for one in rows} == {4}


def counts_of(root: str, world_size: int, batch_size: int, stride: int) -> tuple[Tensor, int]:
    """A confusion matrix of all ranks, of a prediction that follows from the pixels alone."""
    counts_CC, images = torch.zeros(11, 11, dtype=torch.int64), 0
    for rank in range(world_size):
        pair = rank_of(root, rank, world_size, label_stride=stride)
        loader = pair.val
        for batch in loader.epoch(0):
            size = batch.images_NCHW.shape[2:]
            assert all(side % 8 == 0 for side in size) and len(batch.labels_N) <= 4
            assert batch.labels_N.shape[1:] == (size[0] // stride, size[1] // stride)
            shade_NHW = batch.images_NCHW[:, 0, ::stride, ::stride]
            predicted_NHW = ((shade_NHW + 3) * 1.7).long().clamp(0, 10)
            counts_CC += confused(predicted_NHW, batch.labels_N, 11)
            images += len(batch.labels_N)
    return counts_CC, images


@pytest.mark.parametrize("stride", [1, 4])
def test_every_pixel_counts_once_for_every_number_of_ranks(tmp_path, stride):
    root = str(make_camvid(tmp_path, val_sizes=SIZES))
    alone, images = counts_of(root, 1, 4, stride)
    assert images == len(SIZES)
    pair = rank_of(root, 0, 1)
    known = sum(int((pair.sources[1].label_map(n) != 255).sum()) for n in range(len(SIZES)))
    if stride == 1:
        assert alone.sum() == known
    for world_size in (2, 3, 4):
        found, images = counts_of(root, world_size, 4, stride)
        assert torch.equal(found, alone) and images == len(SIZES)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_consecutive_images_of_one_size_share_a_batch(tmp_path, batch_size):
    root = str(make_camvid(tmp_path, val_sizes=SIZES))
    pair = opened(name="camvid", root=root, batch_size=min(batch_size, 6), workers=0)
    found = [(len(b.labels_N), tuple(b.images_NCHW.shape[2:])) for b in pair.val.epoch(0)]
    padded = {(40, 30): (32, 40), (30, 40): (40, 32), (52, 30): (32, 56)}
    assert [size for num, size in found for _ in range(num)] == [padded[size] for size in SIZES]
    assert pair.val.steps_per_epoch == len(found)
    assert [batch.global_size for batch in pair.val.epoch(0)] == [num for num, _ in found]
    ids = [id for batch in pair.val.epoch(0) for id in batch.index_N.tolist()]
    assert ids == list(range(len(SIZES)))


def test_where_batches_of_one_size_begin():
    sizes = np.array([(1, 1)] * 5 + [(2, 1)] + [(1, 1)] * 2)
    assert starts_of(sizes, 2) == (0, 2, 4, 5, 6, 8)
    assert starts_of(sizes, 100) == (0, 5, 6, 8)
    assert starts_of(sizes[:1], 3) == (0, 1)


def test_facts_and_what_a_run_remembers(tmp_path):
    root = str(make_camvid(tmp_path))
    pair = opened(name="camvid", root=root, batch_size=2, image_size=15, label_stride=8)
    facts = pair.facts
    assert (facts.image_shape, facts.label_size) == ((3, 16, 24), (2, 3))
    assert (facts.label_kind, facts.num_classes, len(facts.labels_N)) == ("pixel", 11, 6)
    assert (facts.labels_N == NO_LABEL).all() and (pair.val_labels_N == NO_LABEL).all()
    assert facts.count_pixels is not None
    counts = facts.count_pixels()
    assert counts.dtype == torch.int64 and counts.shape == (11,)
    expected = sum(
        np.bincount(pair.sources[0].label_map(n).ravel(), minlength=256) for n in range(6)
    )
    assert counts.tolist() == expected[:11].tolist()
    kept = pair.remembered
    assert (kept.name, kept.image_size, kept.classes) == ("camvid", 15, pair.sources[0].classes)
    assert str(kept.evaluation) == "short side to 15 (bilinear), all of it"
    assert kept.train is not None and (kept.train.num, kept.train.counts) == (6, ())
    again = type(kept).from_metadata(kept.to_metadata())
    assert again == kept
    assert (
        fastkd.data.loaders.open.data_facts(DataConfig(name="camvid", root=root, image_size=15))
        == kept
    )
    assert pair.remarks[0].startswith(
        "6 training and 3 validation images with label maps of 11 classes, 20x15 pixels, "
        "data.backend=resident (0 MiB when decoded)"
    )
    assert "of the pixels of 6 label maps in camvid/train have no class" in pair.remarks[1]


def test_pictures_of_several_short_sides_are_shown_as_they_are(tmp_path):
    root = str(make_camvid(tmp_path, val_sizes=((40, 30), (50, 40))))
    pair = opened(name="camvid", root=root, batch_size=2, workers=0)
    assert pair.facts.evaluation is None
    assert pair.facts.shown == "whole pictures as they are stored"
    resized = opened(name="camvid", root=root, batch_size=2, workers=0, image_size=15)
    assert resized.facts.shown == str(resized.remembered.evaluation)


def test_auto_is_torch_where_sizes_differ_or_it_is_large(tmp_path, monkeypatch):
    root = str(make_camvid(tmp_path, val_sizes=SIZES))
    pair = opened(name="camvid", root=root, batch_size=2)
    assert (pair.backend, pair.why) == ("torch", "the pictures differ in size")
    same = str(make_camvid(tmp_path / "same"))
    assert opened(name="camvid", root=same, batch_size=2).backend == "resident"
    monkeypatch.setattr(fastkd.data.loaders.open, "RESIDENT_LIMIT_BYTES", 1000)
    assert opened(name="camvid", root=same, batch_size=2).why == "0.0 GiB when decoded"


def test_images_of_several_sizes_are_trained_through_a_window(tmp_path):
    root = str(make_voc(tmp_path))
    pair = opened(name="voc_segmentation", root=root, batch_size=2, workers=0)
    assert pair.remembered.evaluation is not None  # one short side
    assert sum(len(batch.labels_N) for batch in pair.val.epoch(0)) == 2
    with pytest.raises(UserError, match=r"differ in size, 32x24 to 36x24 pixels.*augment\.window"):
        _ = pair.train
    pair = opened(name="voc_segmentation", root=root, batch_size=2, workers=0, window=(16, 28))
    assert pair.facts.image_shape == (3, 16, 32)
    batch = batches(pair)[0]
    assert batch.images_NCHW.shape == (2, 3, 16, 32)
    assert (batch.labels_N[..., 28:] == NO_LABEL).all()


def test_pairs_train_with_a_share_held_back(tmp_path):
    root = str(make_pairs(tmp_path, splits=(), each=8))
    pair = opened(name="pairs", root=root, batch_size=2, val_share=0.25)
    assert (pair.train.num_samples, pair.val.num_samples) == (6, 2)
    assert "2 of the 8 images" in pair.remarks[2]
    assert next(pair.train.epoch(0)).labels_N.max() <= 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_label_maps_without_any_class_are_refused_before_an_epoch(tmp_path, split):
    root = make_pairs(tmp_path)
    for number in range(4):
        label_map(root / "labels" / split / f"{number}.png", (24, 20), (255,))
    with pytest.raises(UserError, match=rf"pairs/{split}: no pixel of its 4 label maps has a cla"):
        _ = opened(name="pairs", root=str(root), batch_size=2).train


def test_masks_of_0_and_255_are_remarked(tmp_path):
    root = make_pairs(tmp_path, classes="no\nyes\n", numbers=(0, 255))
    remarks = opened(name="pairs", root=str(root), batch_size=2).remarks
    assert "name one class only, no, so that" in remarks[2] and "0 to 1" in remarks[2]
    label_map(root / "labels" / "train" / "3.png", (24, 20), (0, 1, 255))
    assert len(opened(name="pairs", root=str(root), batch_size=2).remarks) == 2


def test_a_broken_file_ends_the_epoch_with_its_name(tmp_path):
    root = make_camvid(tmp_path)
    pair = opened(name="camvid", root=str(root), batch_size=3, backend="torch", workers=2)
    file = root / "train" / "images" / "003.png"
    whole = file.read_bytes()
    _ = pair.sources[0].picture_sizes
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"003\.png.*truncated") as caught:
        batches(pair)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"backend": "dali"}, r"data\.backend=dali decodes images without their label maps"),
        ({"on_bad": "skip"}, r"data\.on_bad=skip"),
        ({"exif": "apply"}, r"data\.exif=apply"),
        ({"eval_crop": 10}, r"data\.eval_crop is for images that are evaluated on their centre"),
        ({"label_stride": 3}, r"data\.label_stride=3 does not divide data\.multiple=8"),
        ({"image_dir": "x"}, r"data\.image_dir=x is for data\.name=pairs, got camvid"),
        ({"val_share": 0.1}, r"data\.val_share=0\.1 is for data\.name=folder or pairs"),
        ({"name": "folder", "multiple": 4}, r"data\.multiple=4 is for sets with label maps"),
        ({"name": "folder", "label_stride": 2}, r"data\.label_stride=2 is for sets with label"),
        ({"name": "folder", "eval_mode": "whole"}, r"data\.eval_mode=whole is for sets with"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_keys_of_the_data_that_do_not_go_together(keys, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**({"name": "camvid", "root": "x"} | keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"crop": "resized"}, r"augment\.crop=resized squeezes"),
        ({"pad_mode": "reflect"}, r"augment\.pad_mode=reflect shows pixels twice"),
        ({"policy": "randaugment"}, r"augment\.policy=randaugment shears"),
        ({"policy": "trivial"}, r"augment\.policy=trivial shears"),
        ({"policy": "autoaugment"}, r"augment\.policy=autoaugment shears"),
        ({"erasing": 0.25}, r"augment\.erasing=0\.25 hides"),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_appearances_that_label_maps_do_not_have(tmp_path, keys, message):
    root = str(make_camvid(tmp_path))
    with pytest.raises(UserError, match=message):
        opened(name="camvid", root=root, batch_size=2, **keys)


def test_appearances_that_only_label_maps_have(make_folder):
    for key, value in (("scale", (0.5, 2.0)), ("window", (8, 8))):
        with pytest.raises(UserError, match=rf"augment\.{key} is for sets with label maps"):
            opened(name="folder", root=str(make_folder(name=key)), batch_size=2, **{key: value})
    with pytest.raises(ValidationError, match=r"augment\.scale=2,1"):
        AppearanceConfig(scale=(2.0, 1.0))


@pytest.mark.parametrize(
    ("keys", "hindrance"),
    [({"scale": (0.5, 2.0)}, "augment.scale resizes"), ({}, "the pictures differ in size")],
    ids=["scale", "sizes"],
)
def test_resident_is_refused_where_it_cannot_be(tmp_path, keys, hindrance):
    sizes = {} if keys else {"val_sizes": SIZES}
    root = str(make_camvid(tmp_path, **sizes))
    with pytest.raises(UserError, match=rf"data\.backend=resident keeps .*{hindrance}"):
        opened(name="camvid", root=root, batch_size=2, backend="resident", **keys)


def test_second_views_are_refused(tmp_path):
    from fastkd.data.picture_views import PictureView

    pair = opened(name="camvid", root=str(make_camvid(tmp_path)), batch_size=2)
    with pytest.raises(UserError, match=r"augment\.xprime=cropflip"):
        pair.train.with_views(PictureView("cropflip"))
