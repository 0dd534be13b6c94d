"""The central square of pictures of extreme shapes, cut before they are enlarged."""

import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastkd.data import open_split
from fastkd.data.sources import cuts
from fastkd.data.sources.cuts import framing_cut
from fastkd.storage.facts import Framing


@pytest.mark.parametrize(
    ("size", "resize", "crop"),
    [
        ((3, 400), 32, 32),
        ((400, 3), 32, 32),
        ((90, 61), 40, 33),
        ((7, 7), 20, 20),
        ((900, 50), 9, 8),
    ],
)
def test_both_ways_give_the_same_square(monkeypatch, size, resize, crop):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image, framing = Image.fromarray(pixels), Framing(resize=resize, crop=crop)
    whole = np.asarray(framing_cut(image.size, framing).of(image)).astype(int)
    monkeypatch.setattr(cuts, "_LARGEST_RESIZED", 0)
    cut = np.asarray(framing_cut(image.size, framing).of(image)).astype(int)
    assert cut.shape == (crop, crop, 3)
    # Coordinates of the cut are 32-bit floats: a step of brightness here and there.
    assert np.abs(whole - cut).max() <= 1


@pytest.mark.parametrize("size", [(1, 40_000), (40_000, 1), (2, 60_000)])
def test_a_line_of_pixels_shows_its_middle_and_takes_little_memory(make_folder, size):
    root = make_folder(classes=("a", "b"), per_class=1)
    ramp = np.arange(max(size)) // (max(size) / 200)
    pixels = np.broadcast_to(ramp.astype(np.uint8), (min(size), max(size)))
    image = Image.fromarray(np.ascontiguousarray(pixels if size[0] > size[1] else pixels.T))
    assert image.size == size
    image.save(Path(root / "train" / "a" / "000.png"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    square = open_split("folder", root, image_size=224).images_NHWC[0]
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert set(np.unique(square)) <= {99, 100}
    assert grown_mib < 500
