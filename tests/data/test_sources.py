"""Sources that need no files, the table of normalisations, subsets, and what is not found."""

from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits

from fastkd.data import DATASETS, ImageSet, normalization, open_split
from fastkd.data.normalization import DataName
from fastkd.data.sources.image_set import stratified_positions
from fastkd.errors import UserError


def test_digits_are_the_quickstart_split():
    train, val = open_split("digits"), open_split("digits", split="val")
    assert train.images_NHWC.shape == (300, 16, 16, 3)
    assert val.images_NHWC.shape == (1497, 16, 16, 3)
    assert train.classes == tuple("0123456789")
    np.testing.assert_array_equal(np.bincount(train.labels_N), [30] * 10)


def test_digits_train_and_val_together_are_the_whole_set():
    # the 8x8 originals come back from the enlarged images: each is the sum of weights 9, 3, 3, 1
    # over its neighbours, so compare enlarged originals instead, made by torch
    originals = torch.from_numpy(sklearn_digits().images).float()[:, None] * 255 / 16
    enlarged = torch.nn.functional.interpolate(originals, size=16, mode="bilinear")[:, 0].numpy()
    ours = np.concatenate(
        [open_split("digits", split=split).images_NHWC for split in ("train", "val")]
    )
    assert (ours == ours[..., :1]).all()
    wanted = sorted(np.floor(image + 0.5).astype(np.uint8).tobytes() for image in enlarged)
    got = sorted(np.ascontiguousarray(image[..., 0]).tobytes() for image in ours)
    assert got == wanted


def test_digits_subset_is_a_stratified_prefix():
    small = open_split("digits", limit=50)
    np.testing.assert_array_equal(np.bincount(small.labels_N), [5] * 10)
    np.testing.assert_array_equal(small.images_NHWC, open_split("digits").images_NHWC[:50])


def test_digits_normalisation_is_that_of_its_training_images():
    pixels = open_split("digits").images_NHWC / 255
    mean, std = normalization("digits")
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), atol=5e-5)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2)), atol=5e-5)


def test_cifar_normalisation_is_that_of_the_spec():
    assert normalization("cifar10") == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert normalization("cifar100") == ((0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023))


def test_synthetic_labels_can_be_learned_from_the_pixels():
    train, val = open_split("synthetic"), open_split("synthetic", split="val")
    flat = train.images_NHWC.reshape(len(train), -1).astype(np.float64)
    means_CF = np.stack([flat[train.labels_N == label].mean(0) for label in range(10)])
    val_flat = val.images_NHWC.reshape(len(val), -1).astype(np.float64)
    distances = ((val_flat[:, None] - means_CF) ** 2).sum(2)
    np.testing.assert_array_equal(distances.argmin(1), val.labels_N)
    # noise hides the pattern in a single pixel's place, so images of a class do differ
    assert len({image.tobytes() for image in train.images_NHWC}) == len(train)


@pytest.mark.parametrize("size", [8, 30, 64])
def test_synthetic_has_the_size_asked_for_and_repeats(size):
    first = open_split("synthetic", image_size=size).images_NHWC
    assert first.shape == (2000, size, size, 3)
    np.testing.assert_array_equal(first, open_split("synthetic", image_size=size).images_NHWC)


def test_stratified_positions_are_balanced_and_ascending():
    labels = np.array([0] * 50 + [1] * 3 + [2] * 20)
    chosen = stratified_positions(labels, 15)
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [6, 3, 6])
    np.testing.assert_array_equal(stratified_positions(labels, 73), np.arange(73))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cifar", "somewhere"), "data.name='cifar' is not a data set; choose cifar10, "),
        (("cifar10",), "data.name=cifar10 needs data.root"),
        (("folder", ""), "data.name=folder needs data.root"),
        (("folder", "/no/such/place"), "data.root=/no/such/place is not a folder"),
    ],
    ids=["unknown-name", "no-root", "empty-root", "missing-root"],
)
def test_what_cannot_be_found_is_named(arguments, message):
    with pytest.raises(UserError, match=message):
        open_split(*arguments)


@pytest.mark.parametrize("limit", [0, 301])
def test_impossible_subset_names_both_numbers(limit):
    with pytest.raises(UserError, match=f"subset of {limit} images .* the split has 300"):
        open_split("digits", limit=limit)


def test_fixed_size_sets_refuse_another_size():
    assert len(open_split("digits", image_size=16)) == 300
    with pytest.raises(UserError, match="image_size=32, but digits comes as 16x16"):
        open_split("digits", image_size=32)


def test_labels_outside_the_class_list_are_refused():
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    with pytest.raises(UserError, match=r"labels run from 0 to 2, .* 2 classes \(0 to 1\)"):
        ImageSet("set/train", images, np.array([0, 2]), ("a", "b"))


def test_every_data_set_has_a_normalisation_for_three_channels():
    assert set(DATASETS) == set(get_args(DataName))
    for mean, std in DATASETS.values():
        assert len(mean) == len(std) == 3
        assert all(0 <= value <= 1 for value in mean) and all(0 < value <= 1 for value in std)


def test_importing_the_package_loads_nothing_heavy(program):
    code = (
        "import sys, fastkd.data\n"
        "heavy = {'sklearn', 'torchvision', 'timm', 'matplotlib', 'triton', 'rich.progress'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert program("-c", code).out.strip() == "[]"
