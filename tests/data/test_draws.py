"""Order and per-sample draws: pinned values, independence, and the shape of their distribution."""

import numpy as np
import pytest

from fastkd.data.draws import (
    MIRROR,
    SHIFT_LEFT,
    SHIFT_TOP,
    epoch_order,
    integer_table,
    sample_uniforms,
)


def test_draws_are_pinned_so_that_old_runs_can_be_replayed():
    assert epoch_order(0, 0, 10).tolist() == [7, 6, 8, 3, 2, 4, 1, 5, 0, 9]
    assert epoch_order(7, 3, 10).tolist() == [2, 8, 7, 5, 0, 4, 1, 9, 6, 3]
    assert integer_table(7, 3, SHIFT_TOP, 8, 9).tolist() == [1, 5, 5, 2, 4, 6, 7, 0]
    assert sample_uniforms(7, 3, 5, 2).tolist() == [0.6129611532990211, 0.4328917478671842]


def test_order_is_a_permutation_that_changes_with_seed_and_epoch():
    orders = [epoch_order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    for first in range(4):
        for second in range(first):
            # two unrelated permutations agree in about one place
            assert (orders[first] == orders[second]).sum() < 10


def test_streams_are_unrelated():
    top = integer_table(0, 0, SHIFT_TOP, 10_000, 9)
    left = integer_table(0, 0, SHIFT_LEFT, 10_000, 9)
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.05


@pytest.mark.parametrize(("stream", "high"), [(SHIFT_TOP, 9), (MIRROR, 2)], ids=["shift", "flip"])
def test_integers_are_uniform(stream, high):
    num = 90_000
    counts = np.bincount(integer_table(5, 2, stream, num, high), minlength=high)
    assert len(counts) == high
    expected = num / high
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # 99.99 % point of chi-square with 8 degrees of freedom is 31.8, with 1 it is 15.1
    assert chi_square < (31.8 if high == 9 else 15.1)


def test_uniforms_differ_between_samples_and_epochs():
    draws = {tuple(sample_uniforms(0, epoch, n, 4)) for epoch in range(3) for n in range(5)}
    assert len(draws) == 15
    flat = np.array(sorted(draws)).ravel()
    assert flat.min() >= 0 and flat.max() < 1
