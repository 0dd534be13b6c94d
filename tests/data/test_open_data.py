"""The one entry of the trainer: choice of backend, agreement of the splits, impossible requests."""

import pytest
import torch

from fastkd.data import ResidentLoader, TorchLoader, loaders, open_data
from fastkd.errors import UserError


def test_quickstart_data():
    pair = open_data(
        name="digits", batch_size=64, crop="pad", geometry_padding=2, flip=False, seed=1
    )
    assert isinstance(pair.train, ResidentLoader) and pair.backend == "resident"
    assert (pair.train.num_samples, pair.val.num_samples) == (300, 1497)
    assert (pair.name, pair.image_size, len(pair.classes)) == ("digits", 16, 10)
    images = next(pair.train.epoch(0)).images_NCHW
    assert images.shape == (64, 3, 16, 16)
    # every training image, unpadded, has mean 0 and deviation 1 by the table
    plain = open_data(name="digits", batch_size=300, drop_last=False)
    everything = next(plain.train.epoch(0)).images_NCHW
    torch.testing.assert_close(everything.mean(), torch.tensor(0.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(everything.std(), torch.tensor(1.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("crop", "limit_bytes", "backend"),
    [("pad", 1 << 30, "resident"), ("pad", 1000, "torch"), ("resized", 1 << 30, "torch")],
)
def test_auto_chooses_by_crop_and_size(make_folder, monkeypatch, crop, limit_bytes, backend):
    monkeypatch.setattr(loaders, "RESIDENT_LIMIT_BYTES", limit_bytes)
    pair = open_data(
        name="folder", root=make_folder(), image_size=8, batch_size=4, crop=crop, flip=True
    )
    assert pair.backend == backend
    wanted = ResidentLoader if backend == "resident" else TorchLoader
    assert isinstance(pair.train, wanted) and isinstance(pair.val, wanted)
    assert next(pair.train.epoch(0)).images_NCHW.shape == (4, 3, 8, 8)
    assert sum(len(batch.labels_N) for batch in pair.val.epoch(0)) == 12


def test_backends_agree_on_folders_without_a_given_size(make_folder):
    root = make_folder(size=(12, 12))
    pairs = [
        open_data(
            name="folder", root=root, batch_size=4, crop="pad", geometry_padding=2, backend=backend
        )
        for backend in ("resident", "torch")
    ]
    for resident, workers in zip(pairs[0].train.epoch(1), pairs[1].train.epoch(1), strict=True):
        assert torch.equal(resident.images_NCHW, workers.images_NCHW)
        assert torch.equal(resident.labels_N, workers.labels_N)
    assert pairs[0].image_size == pairs[1].image_size == 12


def test_given_normalisation_replaces_that_of_the_table():
    pair = open_data(name="synthetic", batch_size=4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert (pair.mean, pair.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    images = next(pair.val.epoch(0)).images_NCHW
    assert images.min() >= 0 and images.max() <= 1


def test_limit_concerns_training_only():
    pair = open_data(name="synthetic", batch_size=4, train_limit=100)
    assert (pair.train.num_samples, pair.val.num_samples) == (100, 500)


def test_evaluation_is_not_augmented():
    arguments = {"name": "synthetic", "batch_size": 100, "seed": 3}
    plain = open_data(**arguments)
    augmented = open_data(**arguments, crop="pad", geometry_padding=4, flip=True)
    for first, second in zip(plain.val.epoch(0), augmented.val.epoch(5), strict=True):
        assert torch.equal(first.images_NCHW, second.images_NCHW)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 512}, "batch_size=512, but digits/train has 300 images"),
        ({"world_size": 400}, "400 processes, but digits/train has 300 images"),
        ({"world_size": 100}, "batch_size=64 is for all 100 processes"),
        ({"train_limit": 301}, "subset of 301 images .* has 300"),
        ({"name": "digit"}, "data.name='digit' is not a data set; choose .*digits"),
        ({"backend": "dali"}, "data.backend='dali'; choose auto, resident or torch"),
        ({"crop": "center"}, "crop='center'; choose pad, resized or none"),
        ({"backend": "resident", "crop": "resized"}, "data.backend=resident cannot cut random"),
        ({"name": "folder"}, "data.name=folder needs data.root"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_impossible_requests(changes, message):
    with pytest.raises(UserError, match=message):
        _ = open_data(**({"name": "digits", "batch_size": 64} | changes)).train


def test_what_hinders_training_does_not_hinder_an_evaluation():
    pair = open_data(name="digits", batch_size=512)
    assert pair.val.num_samples == sum(len(batch.index_N) for batch in pair.val.epoch(0))
    with pytest.raises(UserError, match="batch_size=512"):
        _ = pair.train


def test_random_areas_of_a_folder_need_a_size(make_folder):
    with pytest.raises(UserError, match=r"crop=resized needs data\.image_size"):
        open_data(name="folder", root=make_folder(), batch_size=4, crop="resized")
