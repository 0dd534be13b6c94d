"""The composition of global batches, and which part of them each rank gets."""

import numpy as np
import pytest

from fastkd.data.loaders.plan import BatchPlan
from fastkd.errors import UserError


def plan(num_samples, batch_size, *, train=True, world_size=1, rank=0, drop_last=True):
    return BatchPlan(
        "set/train",
        num_samples,
        batch_size,
        seed=3,
        train=train,
        drop_last=drop_last,
        rank=rank,
        world_size=world_size,
    )


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("drop_last", [True, False], ids=["drop", "keep"])
@pytest.mark.parametrize(("num_samples", "batch_size"), [(23, 8), (24, 8), (21, 7)])
def test_parts_of_the_ranks_make_up_the_batch_of_one_process(
    num_samples, batch_size, drop_last, world_size
):
    alone = plan(num_samples, batch_size, drop_last=drop_last)
    ranks = [
        plan(num_samples, batch_size, drop_last=drop_last, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    assert {rank.steps_per_epoch for rank in ranks} == {alone.steps_per_epoch}
    for step in range(alone.steps_per_epoch):
        batch = alone.order(4)[alone.part(step)]
        parts = [rank.order(4)[rank.part(step)] for rank in ranks]
        for part, expected in zip(parts, np.array_split(batch, world_size), strict=True):
            np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("num_samples", [1, 7, 13, 16])
def test_evaluation_takes_every_sample_exactly_once(num_samples, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        own = plan(num_samples, batch_size, train=False, world_size=world_size, rank=rank)
        order = own.order(0)
        for part in own.parts(0):
            assert part.start < part.stop
            seen += order[part].tolist()
    assert sorted(seen) == list(range(num_samples))


def test_partial_batch_is_kept_only_when_every_rank_gets_a_sample():
    assert plan(11, 4, drop_last=False).steps_per_epoch == 3
    assert plan(11, 4, drop_last=False, world_size=3).steps_per_epoch == 3
    assert plan(11, 4, drop_last=False, world_size=4).steps_per_epoch == 2
    assert plan(11, 4, drop_last=True).steps_per_epoch == 2


def test_writing_into_an_order_does_not_change_the_next_one():
    own = plan(23, 8)
    order = own.order(1)
    kept = order.copy()
    order[:] = 0
    np.testing.assert_array_equal(own.order(1), kept)


def test_start_step_skips_whole_batches():
    own = plan(23, 8)
    assert own.parts(1) == own.parts(0)[1:]
    assert own.parts(own.steps_per_epoch) == []
    with pytest.raises(ValueError, match="start_step is 3, an epoch of set/train has 2"):
        own.parts(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 10, "batch_size": 64}, "batch_size=64, but set/train has 10 images"),
        ({"num_samples": 3, "batch_size": 8, "world_size": 4}, "4 processes, but .* has 3 images"),
        ({"num_samples": 30, "batch_size": 2, "world_size": 4}, "batch_size=2 is for all 4"),
        ({"num_samples": 30, "batch_size": 0}, "batch_size=0, expected at least 1"),
    ],
    ids=["no-full-batch", "more-ranks-than-images", "batch-below-ranks", "zero-batch"],
)
def test_an_epoch_without_work_is_a_user_error(arguments, message):
    with pytest.raises(UserError, match=message):
        plan(**arguments)
