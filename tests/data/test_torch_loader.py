"""The torch-workers loader: the same protocol and, with padded crops, the same bytes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop

import fastkd.testing.loading
from fastkd.data import Batch, Loading, ResidentLoader, TorchLoader, open_source, open_split
from fastkd.data.draws import sample_uniforms
from fastkd.data.geometry import Geometry
from fastkd.data.sources.cuts import UNIFORMS_PER_CROP, random_box, random_cut
from fastkd.errors import UserError
from fastkd.storage.facts import Framing

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def loading(rank: int = 0, world_size: int = 1, **changes) -> Loading:
    own = {"geometry": Geometry(padding=2, flip=True), "normalization": (MEAN, STD)}
    return fastkd.testing.loading.loading(
        rank, world_size, **({"batch_size": 5, "seed": 2} | own | changes)
    )


def loader(source, *, image_size=16, crop="resized", workers=0, **changes) -> TorchLoader:
    return TorchLoader(
        source, loading(**changes), image_size=image_size, crop=crop, workers=workers
    )


def rows(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return batch.images_NCHW, batch.labels_N, batch.index_N


def concatenated(batches: list[Batch]) -> Batch:
    parts = (torch.cat(parts) for parts in zip(*map(rows, batches), strict=True))
    return Batch(*parts, global_size=batches[0].global_size)


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.global_size == b.global_size and a.second_NCHW is b.second_NCHW is None
        for tensor, other in zip(rows(a), rows(b), strict=True):
            assert torch.equal(tensor, other)


class Recorded:
    """A source that writes down, also from worker processes, which sample it was asked for."""

    def __init__(self, source, notes: Path):
        self._source = source
        self._notes = notes
        self.name, self.labels_N, self.classes = source.name, source.labels_N, source.classes

    def image(self, sample: int) -> Image.Image:
        with open(self._notes, "a") as stream:
            stream.write(f"{sample}\n")
        return self._source.image(sample)

    def asked(self) -> list[int]:
        return [int(line) for line in self._notes.read_text().split()]


def denormalised(images_NCHW: torch.Tensor) -> np.ndarray:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((images_NCHW * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("pad_mode", ["zero", "reflect"])
def test_padded_crops_are_the_bytes_of_the_resident_loader(make_folder, pad_mode):
    root = make_folder(size=(20, 12))
    geometry = Geometry(padding=3, pad_mode=pad_mode, flip=True)
    for train in (True, False):
        resident = ResidentLoader(
            open_split("folder", root, image_size=10), loading(train=train, geometry=geometry)
        )
        workers = loader(
            open_source("folder", root), crop="pad", image_size=10, train=train, geometry=geometry
        )
        assert_same(list(workers.epoch(3)), list(resident.epoch(3)))


def test_training_view_is_torchvisions_resized_crop_of_the_drawn_box(make_folder):
    source = open_source("folder", make_folder(size=(50, 40)))
    flipped = 0
    for batch in loader(source).epoch(1):
        for pixels, n in zip(denormalised(batch.images_NCHW), batch.index_N.tolist(), strict=True):
            uniforms = sample_uniforms(2, 1, n, UNIFORMS_PER_CROP)
            left, top, width, height = random_box((50, 40), uniforms)
            expected = tv.resized_crop(
                source.image(n), top, left, height, width, [16, 16], InterpolationMode.BILINEAR
            )
            if uniforms[-1] < 0.5:
                expected = tv.hflip(expected)
                flipped += 1
            np.testing.assert_array_equal(pixels, np.asarray(expected))
    assert 0 < flipped < 10


def test_evaluation_view_is_torchvisions_resize_and_centre_crop(make_folder):
    source = open_source("folder", make_folder(size=(61, 47)), "val")
    own = TorchLoader(
        source,
        loading(train=False),
        image_size=16,
        crop="resized",
        framing=Framing(resize=18, crop=16),
    )
    everything = concatenated(list(own.epoch(0)))
    assert everything.index_N.tolist() == list(range(12))
    for pixels, n in zip(denormalised(everything.images_NCHW), range(12), strict=True):
        expected = tv.center_crop(tv.resize(source.image(n), [18]), [16, 16])
        np.testing.assert_array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize("crop", ["resized", "pad"])
def test_views_depend_on_neither_workers_nor_ranks(make_folder, crop):
    source = open_source("folder", make_folder())
    alone = list(loader(source, crop=crop).epoch(4))
    assert_same(list(loader(source, crop=crop, workers=2).epoch(4)), alone)
    ranks = [list(loader(source, crop=crop, rank=rank, world_size=2).epoch(4)) for rank in range(2)]
    together = [concatenated(list(parts)) for parts in zip(*ranks, strict=True)]
    assert_same(together, alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_is_one_sentence_that_names_it(make_folder, workers):
    root = make_folder()
    bad = root / "train" / "bee" / "002.png"
    bad.write_bytes(bad.read_bytes()[:60])
    source = open_source("folder", root)
    with pytest.raises(UserError) as caught:
        list(loader(source, workers=workers, drop_last=False).epoch(0))
    assert str(caught.value).startswith(f"cannot decode the image {bad}: ")
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


AT_EXIT = """
import sys, torch
from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data import Loading, TorchLoader, open_source
placement = Placement(World(0, 0, 1, torch.device("cpu"), None), Precision("fp32", "cpu"))
loading = Loading(batch_size=5, seed=2, train=True, normalization=((0.5,) * 3, (0.5,) * 3),
                  placement=placement)
kept = TorchLoader(open_source("folder", sys.argv[1]), loading, image_size=16, crop="resized",
                   workers=2)
epoch = kept.epoch(0)
next(epoch)
"""


def test_a_loader_that_lives_to_the_end_of_the_program_ends_quietly(program, make_folder):
    assert program("-c", AT_EXIT, make_folder(), timeout=120).err == ""


def test_images_in_memory_can_be_cut_at_random_too():
    source = open_split("digits")
    own = loader(source)
    assert (own.num_samples, own.steps_per_epoch) == (300, 60)
    batch = next(own.epoch(0))
    assert batch.images_NCHW.shape == (5, 3, 16, 16)
    assert batch.images_NCHW.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels_N.tolist() == source.labels_N[batch.index_N].tolist()


@pytest.mark.matrix
def test_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    ours, theirs = [], []
    picture = torch.zeros(3, 60, 90)
    for n in range(1500):
        left, top, width, height = random_box((90, 60), sample_uniforms(0, 0, n, UNIFORMS_PER_CROP))
        assert 0 <= left <= 90 - width and 0 <= top <= 60 - height
        # rounding to whole pixels moves the aspect of the smallest boxes by a few percent
        assert 0.7 < width / height < 1.43
        ours.append((left, top, width, height))
        top, left, height, width = RandomResizedCrop.get_params(
            picture, [0.08, 1.0], [3 / 4, 4 / 3]
        )
        theirs.append((left, top, width, height))
    # the means of 1,500 draws each have a standard error of about 0.4 pixels
    np.testing.assert_allclose(np.mean(ours, 0), np.mean(theirs, 0), atol=3)
    np.testing.assert_allclose(np.std(ours, 0), np.std(theirs, 0), atol=3)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 12), (492, 0, 16, 12)), ((12, 1000), (0, 492, 12, 16))],
    ids=["strip", "column"],
)
def test_extreme_shapes_fall_back_to_the_central_crop(size, expected):
    assert random_box(size, np.full(UNIFORMS_PER_CROP, 0.999)) == expected


def test_crop_is_taken_before_resizing():
    # a white image with a black frame just outside of the crop must not bleed into it
    uniforms = sample_uniforms(0, 0, 3, UNIFORMS_PER_CROP)
    left, top, width, height = random_box((100, 100), uniforms)
    pixels = np.zeros((100, 100, 3), dtype=np.uint8)
    pixels[top : top + height, left : left + width] = 255
    crop = random_cut((100, 100), 20, 0, 0, 3, flip=False).of(Image.fromarray(pixels))
    assert np.asarray(crop).min() == 255
    assert math.isclose(width * height / 1e4, 0.08 + 0.92 * uniforms[0], abs_tol=0.02)


def test_reflect_padding_wider_than_the_images_is_a_user_error(make_folder):
    source = open_source("folder", make_folder())
    with pytest.raises(UserError, match="reflect padding of 16 pixels"):
        loader(source, crop="pad", geometry=Geometry(padding=16, pad_mode="reflect"))
