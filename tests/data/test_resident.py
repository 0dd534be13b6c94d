"""The resident loader: replay, ranks, resumption, evaluation, and what its batches are."""

from typing import Literal

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as v2

from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data import Batch, ImageSet, Loading, ResidentLoader
from fastkd.data.draws import MIRROR, SHIFT_LEFT, SHIFT_TOP, integer_table
from fastkd.data.geometry import Geometry
from fastkd.errors import UserError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
ALONE = Placement(World(0, 0, 1, torch.device("cpu"), None), Precision("fp32", "cpu"))


def image_set(num: int = 50, size: int = 8) -> ImageSet:
    random = np.random.default_rng(0)
    return ImageSet(
        "set/train",
        random.integers(0, 256, (num, size, size, 3), dtype=np.uint8),
        random.integers(0, 4, num),
        ("a", "b", "c", "d"),
    )


def placed(
    device: str = "cpu",
    precision: Literal["fp32", "bf16"] = "fp32",
    channels_last: bool = True,
    rank: int = 0,
    world_size: int = 1,
) -> Placement:
    world = World(rank, rank, world_size, torch.device(device), None)
    return Placement(world, Precision(precision, device), channels_last)


def loader(
    images: ImageSet | None = None, *, placement: Placement = ALONE, **changes
) -> ResidentLoader:
    arguments = {
        "batch_size": 12,
        "seed": 5,
        "train": True,
        "geometry": Geometry(padding=2, flip=True),
        "normalization": (MEAN, STD),
        "placement": placement,
    }
    loading = Loading(**(arguments | changes))
    return ResidentLoader(image_set() if images is None else images, loading)


def rows(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return batch.images_NCHW, batch.labels_N, batch.index_N


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.global_size == b.global_size and a.second_NCHW is b.second_NCHW is None
        for tensor, other in zip(rows(a), rows(b), strict=True):
            assert torch.equal(tensor, other)


def concatenated(batches: list[Batch]) -> Batch:
    parts = (torch.cat(parts) for parts in zip(*map(rows, batches), strict=True))
    return Batch(*parts, global_size=batches[0].global_size)


def test_batches_are_the_torchvision_transforms_of_the_drawn_samples():
    images = image_set()
    tables = {
        stream: integer_table(5, 3, stream, 50, high)
        for stream, high in ((SHIFT_TOP, 5), (SHIFT_LEFT, 5), (MIRROR, 2))
    }
    flips = 0
    for batch in loader(images).epoch(3):
        for image, label, n in zip(*rows(batch), strict=True):
            n = int(n)
            assert label == images.labels_N[n]
            expected = torch.from_numpy(images.images_NHWC[n]).permute(2, 0, 1)
            expected = v2.crop(
                v2.pad(expected, [2]), tables[SHIFT_TOP][n], tables[SHIFT_LEFT][n], 8, 8
            )
            if tables[MIRROR][n]:
                expected = v2.horizontal_flip(expected)
                flips += 1
            expected = v2.to_dtype(expected, torch.float32, scale=True)
            assert torch.equal(image, v2.normalize(expected, list(MEAN), list(STD)))
    assert 12 < flips < 36


def test_batch_contract():
    own = loader(placement=placed(precision="bf16"))
    batch = next(own.epoch(0))
    assert batch.images_NCHW.shape == (12, 3, 8, 8)
    assert batch.images_NCHW.dtype == torch.bfloat16
    assert batch.images_NCHW.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels_N.dtype == batch.index_N.dtype == torch.int64
    assert (own.num_samples, own.steps_per_epoch) == (50, 4)
    assert own.labels_N.tolist() == image_set().labels_N.tolist()
    contiguous = next(loader(placement=placed(channels_last=False)).epoch(0)).images_NCHW
    assert contiguous.is_contiguous()


def test_an_epoch_is_replayed_from_its_number_alone():
    first = loader()
    for epoch in range(3):
        list(first.epoch(epoch))
    assert_same(list(first.epoch(1)), list(loader().epoch(1)))


def test_epochs_and_seeds_differ_in_order_and_in_views():
    batches = [
        concatenated(list(loader(seed=seed).epoch(epoch)))
        for seed, epoch in ((5, 0), (5, 1), (6, 0))
    ]
    for one in range(3):
        for other in range(one):
            a, b = batches[one], batches[other]
            assert (a.index_N == b.index_N).float().mean() < 0.2
            a_views, b_views = (
                {int(n): image for n, image in zip(x.index_N, x.images_NCHW, strict=True)}
                for x in (a, b)
            )
            same = [torch.equal(a_views[n], b_views[n]) for n in a_views.keys() & b_views.keys()]
            assert np.mean(same) < 0.2


def test_training_batches_hold_no_sample_twice():
    index = concatenated(list(loader().epoch(0))).index_N
    assert len(index.unique()) == len(index) == 48


@pytest.mark.parametrize("drop_last", [True, False], ids=["drop", "keep"])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_together_give_the_batches_of_one_process(world_size, drop_last):
    alone = list(loader(drop_last=drop_last).epoch(2))
    ranks = [
        list(
            loader(drop_last=drop_last, placement=placed(rank=rank, world_size=world_size)).epoch(2)
        )
        for rank in range(world_size)
    ]
    # 50 = 4 * 12 + 2: the partial batch of two cannot be shared by more than two ranks
    steps = 5 if not drop_last and world_size == 2 else 4
    together = [concatenated(list(parts)) for parts in zip(*ranks, strict=True)]
    assert len(together) == steps
    assert_same(together, alone[:steps])


@pytest.mark.parametrize("start_step", [0, 1, 3, 4])
def test_starting_in_mid_epoch_gives_the_same_rest(start_step):
    whole = list(loader().epoch(1))
    assert_same(list(loader().epoch(1, start_step)), whole[start_step:])


def test_starting_in_mid_epoch_computes_no_earlier_batch(monkeypatch):
    own = loader()
    fetched = []
    original = own._crops

    def spy(index_N, epoch, appearance):
        fetched.append(index_N.tolist())
        return original(index_N, epoch, appearance)

    monkeypatch.setattr(own, "_crops", spy)
    iterator = own.epoch(0, 2)
    assert fetched == []
    rest = list(iterator)
    assert fetched == [batch.index_N.tolist() for batch in rest]
    assert len(fetched) == 2


def test_a_part_holds_the_own_samples_of_the_global_batch():
    for rank in range(3):
        loading = Loading(
            batch_size=12,
            seed=5,
            train=True,
            normalization=(MEAN, STD),
            placement=placed(rank=rank, world_size=3),
        )
        plan = loading.plan(image_set())
        for step, batch in enumerate(ResidentLoader(image_set(), loading).epoch(2)):
            assert plan.global_size(step) == batch.global_size == 12
            part = plan.order(2)[plan.part(step)]
            assert part.tolist() == batch.index_N.tolist()
    assert list(loader(drop_last=False).epoch(0))[4].global_size == 2


def test_start_step_outside_the_epoch_is_refused_at_once():
    with pytest.raises(ValueError, match="start_step is 5, an epoch of set/train has 4"):
        loader().epoch(0, 5)


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_is_plain_and_complete(world_size):
    images = image_set()
    batches = []
    for rank in range(world_size):
        own = loader(images, train=False, placement=placed(rank=rank, world_size=world_size))
        batches += list(own.epoch(7))
    everything = concatenated(batches)
    order = everything.index_N.argsort()
    assert everything.index_N[order].tolist() == list(range(50))
    plain = torch.from_numpy(images.images_NHWC).permute(0, 3, 1, 2)
    plain = v2.normalize(v2.to_dtype(plain, torch.float32, scale=True), list(MEAN), list(STD))
    assert torch.equal(everything.images_NCHW[order], plain)
    assert torch.equal(everything.labels_N[order], torch.from_numpy(images.labels_N))


def test_without_shuffling_training_is_in_canonical_order():
    index = concatenated(list(loader(shuffle=False, drop_last=False).epoch(3))).index_N
    assert index.tolist() == list(range(50))


def test_two_epochs_can_be_iterated_at_once():
    own = loader()
    pairs = list(zip(own.epoch(0), own.epoch(1), strict=True))
    assert_same([first for first, _ in pairs], list(loader().epoch(0)))
    assert_same([second for _, second in pairs], list(loader().epoch(1)))


def test_reflect_padding_wider_than_the_images_is_a_user_error():
    with pytest.raises(UserError, match=r"set/train: reflect padding of 8 pixels .* got 8x8"):
        loader(geometry=Geometry(padding=8, pad_mode="reflect"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_batches_equal_cpu_batches_without_a_synchronisation():
    own = loader(placement=placed("cuda"))
    iterator = own.epoch(0)
    got = [next(iterator)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got += list(iterator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_host = [Batch(*(part.cpu() for part in rows(batch)), batch.global_size) for batch in got]
    assert_same(on_host, list(loader().epoch(0)))
