"""Second views of a picture: a draw for each image, alike on any backend and ranks."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastkd.data import Batch, ImageSet, ResidentLoader, TorchLoader
from fastkd.data.draws import (
    MIRROR,
    POLICY,
    SHIFT_LEFT,
    SHIFT_TOP,
    integer_table,
    sample_words,
)
from fastkd.data.geometry import Geometry
from fastkd.data.picture_views import PICTURE_VIEWS, PictureView
from fastkd.data.policies.policy import make_policy
from fastkd.data.sources.cuts import random_cut
from fastkd.testing.loading import loading

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SEED, EPOCH, NUM, SIDE = 5, 3, 23, 12


def picture_set(side: int = SIDE) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (NUM, side, side, 3), np.uint8)
    return ImageSet("set/train", pixels, np.arange(NUM) % 4, ("a", "b", "c", "d"))


def loader(backend: str = "resident", **changes: Any) -> Any:
    given = loading(
        changes.pop("rank", 0),
        changes.pop("world_size", 1),
        seed=SEED,
        normalization=(MEAN, STD),
        geometry=Geometry(padding=2, flip=True),
        drop_last=False,
    )
    if backend == "resident":
        return ResidentLoader(picture_set(), given, **changes)
    return TorchLoader(picture_set(), given, **{"image_size": SIDE, "crop": "pad"} | changes)


def every_view(batch: Batch) -> tuple[torch.Tensor, ...]:
    """x and its second views."""
    num = len(batch.labels_N)
    assert batch.images_NCHW.shape[0] == num and batch.second_NCHW is not None
    return batch.images_NCHW, *batch.second_NCHW.split(num)


def cut(sample: int, appearance: int) -> torch.Tensor:
    """The padded crop of one appearance, uint8 [3, H, W], by torchvision."""
    top, left, flip = (
        integer_table(SEED, EPOCH, stream, NUM, high, appearance)[sample]
        for stream, high in ((SHIFT_TOP, 5), (SHIFT_LEFT, 5), (MIRROR, 2))
    )
    picture = torch.from_numpy(picture_set().images_NHWC[sample]).permute(2, 0, 1)
    crop = v2.functional.crop(v2.functional.pad(picture, [2]), top, left, SIDE, SIDE)
    return v2.functional.horizontal_flip(crop) if flip else crop


def expected(kind: Any, sample: int, appearance: int) -> torch.Tensor:
    """One view of one picture, normalised, made alone."""
    if kind == "cropflip":
        view = cut(sample, appearance)
    else:
        # tests/data/test_policies.py compares the operations with torchvision's.
        policy = make_policy(kind)
        one = np.array([sample])
        words = sample_words(SEED, EPOCH, POLICY, NUM, one, policy.words, appearance)
        view = policy.of(cut(sample, 0).permute(1, 2, 0)[None], words)[0].permute(2, 0, 1)
    return v2.functional.normalize(v2.functional.to_dtype(view, scale=True), MEAN, STD)


@pytest.mark.parametrize("backend", ["resident", "torch"])
@pytest.mark.parametrize("kind", PICTURE_VIEWS)
def test_each_view_has_its_own_draw(kind: str, backend: str) -> None:
    plain = list(loader(backend).epoch(EPOCH))
    batches = list(loader(backend).with_views(PictureView(kind, 2)).epoch(EPOCH))
    assert len(batches) == 3
    changed = []
    for batch, alone in zip(batches, plain, strict=True):
        num = len(batch.labels_N)
        assert batch.images_NCHW.shape == (num, 3, SIDE, SIDE)
        assert batch.second_NCHW.shape == (2 * num, 3, SIDE, SIDE)
        assert batch.images_NCHW.is_contiguous(memory_format=torch.channels_last)
        assert batch.second_NCHW.is_contiguous(memory_format=torch.channels_last)
        x, *views = every_view(batch)
        assert torch.equal(x, alone.images_NCHW)
        assert torch.equal(batch.index_N, alone.index_N)
        assert torch.equal(batch.labels_N, alone.labels_N)
        for appearance, view in enumerate(views, 1):
            for image, shown, n in zip(view, x, batch.index_N.tolist(), strict=True):
                assert torch.equal(image, expected(kind, n, appearance))
                changed.append(not torch.equal(image, shown))
    assert sum(changed) > len(changed) / 2


def test_a_second_resized_crop_has_draws_of_its_own() -> None:
    own = loader("torch", crop="resized", image_size=7).with_views(PictureView("cropflip", 2))
    batch = next(own.epoch(EPOCH))
    views = every_view(batch)
    for appearance, view in enumerate(views):
        for image, n in zip(view, batch.index_N.tolist(), strict=True):
            picture = Image.fromarray(picture_set().images_NHWC[n])
            crop = random_cut(picture.size, 7, SEED, EPOCH, n, True, appearance).of(picture)
            pixels = torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1)
            scaled = v2.functional.to_dtype(pixels, torch.float32, scale=True)
            assert torch.equal(image, v2.functional.normalize(scaled, MEAN, STD))
    assert not torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])


def by_sample(batches: list[Batch]) -> dict[int, torch.Tensor]:
    """All views of each sample id."""
    return {
        n: torch.stack(every_view(batch))[:, row]
        for batch in batches
        for row, n in enumerate(batch.index_N.tolist())
    }


@pytest.mark.parametrize("kind", PICTURE_VIEWS)
def test_ranks_and_workers_change_nothing(kind: str) -> None:
    whole = by_sample(list(loader().with_views(PictureView(kind, 2)).epoch(EPOCH)))
    ranks = [loader(rank=rank, world_size=2).with_views(PictureView(kind, 2)) for rank in range(2)]
    parts = [batch for own in ranks for batch in own.epoch(EPOCH)]
    workers = loader("torch", workers=2, crop="pad").with_views(PictureView(kind, 2)).epoch(EPOCH)
    for found in (by_sample(parts), by_sample(list(workers))):
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[n], whole[n]) for n in whole)


@pytest.mark.parametrize("kind", PICTURE_VIEWS)
def test_an_epoch_that_starts_late_draws_the_same(kind: str) -> None:
    whole = list(loader().with_views(PictureView(kind)).epoch(EPOCH))
    own = loader().with_views(PictureView(kind))
    list(own.epoch(0))
    (late,) = own.epoch(EPOCH, 2)
    assert torch.equal(late.images_NCHW, whole[2].images_NCHW)
    assert torch.equal(late.second_NCHW, whole[2].second_NCHW)
    other = by_sample(list(own.epoch(EPOCH + 1)))
    same = [torch.equal(views[1], other[n][1]) for n, views in by_sample(whole).items()]
    assert sum(same) < len(same) / 3


def test_the_random_numbers_of_others_go_on_where_they_were() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    list(loader().with_views(PictureView("randaugment")).epoch(0))
    assert torch.equal(torch.rand(3), wanted)


def test_the_loader_that_was_asked_still_shows_x_only() -> None:
    own = loader()
    own.with_views(PictureView("cropflip", 3))
    batch = next(own.epoch(0))
    assert batch.images_NCHW.shape[0] == 10 and batch.second_NCHW is None


def test_unknown_views_are_named() -> None:
    with pytest.raises(ValueError, match="1 views 'blur': expected 1 or more of cropflip"):
        loader().with_views(PictureView("blur"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="0 views 'cropflip'"):
        PictureView("cropflip", 0)
