"""Erased rectangles: torchvision's ranges, zeros inside, nothing outside."""

import numpy as np
import pytest
import torch

from fastkd.data.draws import ERASE, sample_words
from fastkd.data.policies.erasing import WORDS_PER_RECTANGLE, erase, rectangles

NUM = 20_000


def drawn(side: int, probability: float) -> np.ndarray:
    words = sample_words(0, 0, ERASE, NUM, np.arange(NUM), WORDS_PER_RECTANGLE)
    return rectangles(words, side, probability)


@pytest.mark.parametrize("side", [32, 224])
def test_areas_and_proportions_are_torchvisions(side: int) -> None:
    top, bottom, left, right = drawn(side, 1.0).T
    height, width = bottom - top, right - left
    assert (top >= 0).all() and (bottom <= side).all()
    assert (left >= 0).all() and (right <= side).all()
    assert (height < side).all() and (width < side).all() and (height > 0).all()
    share, ratio = height * width / side**2, height / width
    # The mean of U(0.02, 0.33), less what does not fit; one pixel of rounding on each side.
    assert share.mean() == pytest.approx((0.02 + 0.33) / 2, rel=0.02)
    assert share.min() > 0.01 and share.max() < 0.38
    assert abs(np.log(ratio).mean()) < 0.02
    low, high = np.quantile(ratio, (0.001, 0.999))
    assert low > 0.25 and high < 4
    # Any place is as likely: the middle lies in the middle.
    assert abs(((top + bottom) / 2 / side).mean() - 0.5) < 0.01


def test_the_share_of_images_is_that_which_was_asked() -> None:
    for probability in (0.0, 0.25, 1.0):
        found = (drawn(32, probability)[:, 1] > 0).mean()
        assert abs(found - probability) < 0.015


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_of_the_rectangle_are_zero_and_no_others(layout: torch.memory_format) -> None:
    images = (torch.rand(3, 3, 9, 9) + 1).contiguous(memory_format=layout)
    boxes = np.array([[2, 5, 0, 9], [0, 0, 0, 0], [8, 9, 3, 4]])
    erased = erase(images.clone(), boxes)
    for n, (top, bottom, left, right) in enumerate(boxes):
        wanted = images[n].clone()
        wanted[:, top:bottom, left:right] = 0
        assert torch.equal(erased[n], wanted)
    assert erased.is_contiguous(memory_format=layout)
