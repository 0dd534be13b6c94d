"""The pictures of a run on labelled pixels: every panel shows what it says."""

import matplotlib.image
import numpy as np
import pytest
from PIL import Image

from fastkd.data.sources.label_ids import NO_CLASS
from fastkd.report.colours import WRONG, colours_of
from fastkd.report.predictions import (
    Example,
    _coloured,
    _errors,
    draw_predictions,
    plot_predictions,
)

CLASSES = ("sky", "road", "car [red] $x$", "tree")
PALETTE = [(10, 20, 30), (200, 0, 0), (0, 200, 0), (0, 0, 200)]


def example(height=24, width=40, seed=0, names=("student alone", "teacher", "student distilled")):
    generator = np.random.default_rng(seed)
    label_HW = generator.integers(0, 4, (height, width)).astype(np.uint8)
    label_HW[:4] = NO_CLASS
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    answers = {name: np.full_like(label_HW, number) for number, name in enumerate(names)}
    return Example(Image.fromarray(pixels), label_HW, answers)


def test_classes_have_their_colours_and_no_class_is_white():
    ids_HW = np.array([[0, 3], [2, NO_CLASS]], dtype=np.uint8)
    found = _coloured(ids_HW, np.array(PALETTE, dtype=np.uint8))
    assert found.tolist() == [[[10, 20, 30], [0, 0, 200]], [[0, 200, 0], [255, 255, 255]]]


def test_wrong_pixels_are_drawn_and_those_without_a_label_are_not():
    one = example()
    found = _errors(one, "teacher")
    known = one.label_HW != NO_CLASS
    wrong = known & (one.label_HW != 1)
    assert (found[wrong] == WRONG).all()
    assert (found[~known] == 255).all()
    right = found[known & ~wrong]
    assert (right[:, 0] == right[:, 2]).all()
    assert right.max() < 255


@pytest.mark.parametrize("names", [("student",), ("teacher", "student distilled")])
@pytest.mark.parametrize("palette", [PALETTE, None])
def test_the_picture_is_written_and_nearly_nothing_else(tmp_path, names, palette):
    # Images of several sizes and shapes.
    examples = [example(names=names), example(60, 30, 1, names), example(16, 90, 2, names)]
    said = draw_predictions(tmp_path / "p.png", examples, CLASSES, palette, title="camvid [x]")
    assert said == f"pictures {tmp_path / 'p.png'}"
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]
    shown = matplotlib.image.imread(tmp_path / "p.png")
    assert shown.shape[1] > 400 * (len(names) + 3)
    colours = np.round(255 * shown[..., :3].reshape(-1, 3)).astype(int)
    seen = {tuple(colour) for colour in np.unique(colours, axis=0).tolist()}
    assert {WRONG, (255, 255, 255), *colours_of(len(CLASSES), palette)} <= seen


def test_a_picture_that_cannot_be_drawn_does_not_end_a_run(tmp_path):
    said = draw_predictions(tmp_path / "missing" / "p.png", [example()], CLASSES, PALETTE)
    assert said.startswith("no pictures: ")
    assert "missing" in said
    assert draw_predictions(tmp_path / "p.png", [], CLASSES, PALETTE).startswith("no pictures: ")


def test_the_picture_leaves_matplotlib_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    plot_predictions(tmp_path / "p.png", [example()], CLASSES, PALETTE)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("num", [1, 8, 21, 150, 256])
def test_every_class_has_a_colour(num):
    found = colours_of(num)
    assert len(found) == num
    assert all(0 <= part <= 255 for colour in found for part in colour)
    assert len(set(found)) == num or num > 60
    assert WRONG not in found
    assert (255, 255, 255) not in found
    # A palette comes first, and what it lacks is filled up.
    assert colours_of(num, PALETTE)[:4] == PALETTE[:num]
    assert len(colours_of(num, PALETTE)) == num
