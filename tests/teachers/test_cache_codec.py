"""How answers become bytes and come back, against float64."""

import math

import numpy as np
import pytest
import torch

from fastkd.errors import UserError
from fastkd.teachers.cache.codec import Column, codec_of

ULP = {"fp16": 2.0**-11, "bf16": 2.0**-8}
"""Half a step between neighbouring numbers, relative."""


def logits(num, classes, dtype=torch.float32, scale=4.0):
    noise = torch.Generator().manual_seed(classes)
    return (scale * torch.randn(num, classes, generator=noise)).to(dtype)


def through(answers, **keys):
    codec = codec_of(Column.of(answers, **keys))
    encoded = codec.encode(answers)
    assert encoded.dtype == torch.uint8
    assert encoded.shape == (len(answers), codec.row_bytes)
    return codec.decode(encoded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 10), (1, 3), (5, 2, 3, 4)])
def test_full_keeps_every_bit_and_the_type(dtype, shape):
    answers = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    answers.view(-1)[:2] = torch.tensor([math.inf, -0.0])
    back = through(answers)
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), answers.view(torch.uint8))


def test_maps_come_back_in_their_memory_layout():
    answers = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    back = through(answers)
    assert torch.equal(back, answers)
    assert back.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("format", ["fp16", "bf16"])
def test_shorter_types_round_once(format):
    answers = logits(50, 33)
    back = through(answers, format=format)
    assert back.dtype == torch.float32
    error = (back.double() - answers.double()).abs() / answers.double().abs()
    assert error.max() <= ULP[format]


def marginal(answers, top):
    """Marginal smoothing in float64: log-probabilities, what is not kept spread evenly."""
    found = np.empty(answers.shape)
    for row, out in zip(answers.double().numpy(), found, strict=True):
        log_p = row - row.max()
        log_p -= np.log(np.exp(log_p).sum())
        kept = np.argsort(-log_p)[:top]
        out[:] = np.log((1 - np.exp(log_p[kept]).sum()) / (len(row) - top))
        out[kept] = log_p[kept]
    return found


@pytest.mark.parametrize("classes", [3, 10, 256, 257, 1000, 40_000])
@pytest.mark.parametrize("top", [1, 2, 9, 255])
@pytest.mark.parametrize("format", ["top16", "top8"])
def test_the_top_classes_are_kept_and_the_rest_is_spread_evenly(classes, top, format):
    if top >= classes:
        with pytest.raises(UserError, match=f"cache_top={top} of {classes} classes"):
            through(logits(4, classes), format=format, top=top)
        return
    answers = logits(20, classes, scale=2.0)
    back = through(answers, format=format, top=top).double().numpy()
    truth = marginal(answers, top)
    kept = np.argsort(-truth, axis=1)[:, :top]
    spread = np.take_along_axis(truth, kept, 1)
    # A step of the stored numbers; of top8 also half of one of 256 levels.
    step = np.abs(spread) * 2.0**-10 + 1e-3
    if format == "top8":
        step = step + np.ptp(spread, axis=1, keepdims=True) / 255
    assert (np.abs(np.take_along_axis(back, kept, 1) - spread) <= step).all()
    # The probabilities still sum to 1, within the same rounding.
    assert np.exp(back).sum(1) == pytest.approx(1.0, abs=0.02)
    others = np.exp(back).sum(1) - np.exp(np.take_along_axis(back, kept, 1)).sum(1)
    assert others == pytest.approx(1 - np.exp(spread).sum(1), abs=0.02)


def test_a_certain_teacher_leaves_no_probability_but_a_finite_logarithm():
    answers = torch.tensor([[100.0, 0.0, 0.0, 0.0], [0.0, 200.0, -200.0, 0.0]])
    for format in ("top16", "top8"):
        back = through(answers, format=format, top=2)
        assert torch.isfinite(back).all()
        assert torch.equal(back.argmax(1), answers.argmax(1))


@pytest.mark.parametrize(
    ("format", "classes", "top", "expected"),
    [
        ("full", 1000, 0, 4000),
        ("fp16", 1000, 0, 2000),
        ("top16", 1000, 10, 10 * 2 + 10 * 2),
        ("top8", 1000, 10, 4 + 10 + 2 + 10 * 2),  # two bytes of padding before the class numbers
        ("top16", 100, 5, 12 + 5 + 3),
    ],
)
def test_bytes_of_an_image(format, classes, top, expected):
    assert codec_of(Column.of(logits(1, classes), format=format, top=top)).row_bytes == expected


def test_class_numbers_that_do_not_exist_are_no_error():
    """A block may hold anything; on a GPU an index out of range would end the process."""
    codec = codec_of(Column.of(logits(4, 10), format="top8", top=3))
    back = codec.decode(torch.full((4, codec.row_bytes), 255, dtype=torch.uint8))
    assert back.shape == (4, 10)
