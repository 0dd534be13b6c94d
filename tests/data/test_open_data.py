"""The one entry of the trainer: choice of backend, agreement of the splits, impossible requests."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

import fastkd.data.loaders.open
from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data import DataPair, ResidentLoader, TorchLoader, open_data
from fastkd.data.config import AppearanceConfig, DataConfig
from fastkd.errors import UserError


def opened(*, batch_size: int, seed: int = 0, world_size: int = 1, **keys: Any) -> DataPair:
    """The data of these recipe keys; unless they say so, without crop and flip."""
    geometry = {key: keys.pop(key) for key in AppearanceConfig.model_fields if key in keys}
    world = World(0, 0, world_size, torch.device("cpu"), None)
    return open_data(
        DataConfig(**keys),
        AppearanceConfig(**({"crop": "none", "flip": False} | geometry)),
        batch_size=batch_size,
        seed=seed,
        placement=Placement(world, Precision("fp32", "cpu")),
    )


def test_quickstart_data():
    pair = opened(name="digits", batch_size=64, crop="pad", padding=2, flip=False, seed=1)
    assert isinstance(pair.train, ResidentLoader) and pair.backend == "resident"
    assert (pair.train.num_samples, pair.val.num_samples) == (300, 1497)
    assert (pair.name, pair.facts.image_shape) == ("digits", (3, 16, 16))
    assert (pair.facts.num_classes, pair.facts.label_kind) == (10, "class")
    assert torch.equal(pair.facts.labels_N, pair.train.labels_N)
    images = next(pair.train.epoch(0)).images_NCHW
    assert images.shape == (64, 3, 16, 16)
    # every training image, unpadded, has mean 0 and deviation 1 by the table
    plain = opened(name="digits", batch_size=300, drop_last=False)
    everything = next(plain.train.epoch(0)).images_NCHW
    torch.testing.assert_close(everything.mean(), torch.tensor(0.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(everything.std(), torch.tensor(1.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("crop", "limit_bytes", "backend", "why"),
    [
        ("pad", 1 << 30, "resident", "0 MiB when decoded"),
        ("pad", 1000, "torch", "0.0 GiB when decoded"),
        ("resized", 1 << 30, "torch", "random areas are cut from the files"),
    ],
)
def test_auto_chooses_by_crop_and_size(make_folder, monkeypatch, crop, limit_bytes, backend, why):
    monkeypatch.setattr(fastkd.data.loaders.open, "RESIDENT_LIMIT_BYTES", limit_bytes)
    pair = opened(
        name="folder", root=str(make_folder()), image_size=8, batch_size=4, crop=crop, flip=True
    )
    assert pair.backend == backend
    assert f"data.backend={backend} ({why})" in pair.remarks[0]
    wanted = ResidentLoader if backend == "resident" else TorchLoader
    assert isinstance(pair.train, wanted) and isinstance(pair.val, wanted)
    assert next(pair.train.epoch(0)).images_NCHW.shape == (4, 3, 8, 8)
    assert sum(len(batch.labels_N) for batch in pair.val.epoch(0)) == 12


def test_backends_agree_on_folders_without_a_given_size(make_folder):
    root = str(make_folder(size=(12, 12)))
    pairs = [
        opened(name="folder", root=root, batch_size=4, crop="pad", padding=2, backend=backend)
        for backend in ("resident", "torch")
    ]
    for resident, workers in zip(pairs[0].train.epoch(1), pairs[1].train.epoch(1), strict=True):
        assert torch.equal(resident.images_NCHW, workers.images_NCHW)
        assert torch.equal(resident.labels_N, workers.labels_N)
    assert pairs[0].facts.image_shape == pairs[1].facts.image_shape == (3, 12, 12)


def test_given_normalisation_replaces_that_of_the_table():
    pair = opened(name="synthetic", batch_size=4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert pair.facts.normalization == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    images = next(pair.val.epoch(0)).images_NCHW
    assert images.min() >= 0 and images.max() <= 1


def test_limit_concerns_training_only():
    pair = opened(name="synthetic", batch_size=4, train_limit=100)
    assert (pair.train.num_samples, pair.val.num_samples) == (100, 500)


def test_evaluation_is_not_augmented():
    arguments = {"name": "synthetic", "batch_size": 100, "seed": 3}
    plain = opened(**arguments)
    augmented = opened(**arguments, crop="pad", padding=4, flip=True)
    for first, second in zip(plain.val.epoch(0), augmented.val.epoch(5), strict=True):
        assert torch.equal(first.images_NCHW, second.images_NCHW)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 512}, "batch_size=512, but digits/train has 300 images"),
        ({"world_size": 400}, "400 processes, but digits/train has 300 images"),
        ({"world_size": 100}, "batch_size=64 is for all 100 processes"),
        ({"train_limit": 301}, "subset of 301 images .* has 300"),
        ({"backend": "resident", "crop": "resized"}, "data.backend=resident cannot cut random"),
        ({"name": "folder"}, "data.name=folder needs data.root"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_impossible_requests(changes, message):
    with pytest.raises(UserError, match=message):
        _ = opened(**({"name": "digits", "batch_size": 64} | changes)).train


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "digit"}, "name\n.*'digits', 'cifar10', .*'pairs', 'folder' or 'synthetic'"),
        ({"backend": "ffcv"}, "backend\n.*'auto', 'resident', 'torch' or 'dali'"),
        ({"crop": "center"}, "crop\n.*'pad', 'resized' or 'none'"),
    ],
    ids=["digit", "ffcv", "center"],
)
def test_unknown_words_are_refused_by_their_section(changes, message):
    with pytest.raises(ValidationError, match=message):
        opened(**({"name": "digits", "batch_size": 64} | changes))


def test_what_hinders_training_does_not_hinder_an_evaluation():
    pair = opened(name="digits", batch_size=512)
    assert pair.val.num_samples == sum(len(batch.index_N) for batch in pair.val.epoch(0))
    with pytest.raises(UserError, match="batch_size=512"):
        _ = pair.train


def test_random_areas_of_a_folder_need_a_size(make_folder):
    with pytest.raises(UserError, match=r"crop=resized needs data\.image_size"):
        opened(name="folder", root=str(make_folder()), batch_size=4, crop="resized")
