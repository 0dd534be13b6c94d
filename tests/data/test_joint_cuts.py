"""One cut for a picture and its label map: aligned, never blended, torchvision's pixels."""

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from fastkd.data.sources.joint_cuts import JointCut, JointView, at_stride
from fastkd.data.sources.label_ids import NO_CLASS

ROUNDS = range(60)
Random = np.random.Generator


@pytest.fixture
def random(request: pytest.FixtureRequest) -> Random:
    """Of its own for each round."""
    call = getattr(request.node, "callspec", None)
    return np.random.default_rng(call.params["round"] if call else 0)


def any_view(random: Random, *, scales: bool = True) -> JointView:
    """Random keys, also such that windows are larger than the picture."""
    low = float(random.uniform(0.3, 1.2))
    resized, scaled = (scales and random.random() < 0.6 for _ in range(2))
    return JointView(
        short_side=int(random.integers(8, 60)) if resized else None,
        multiple=int(random.choice([1, 2, 8, 16])),
        train=bool(random.random() < 0.9),
        seed=int(random.integers(1000)),
        num_ids=50,
        padding=int(random.integers(0, 6)),
        flip=True,
        scale=(low, low + float(random.uniform(0, 1))) if scaled else None,
        window=tuple(random.integers(5, 70, 2).tolist()) if random.random() < 0.6 else None,
    )


def any_cut(
    random: Random, picture: tuple[int, int], *, scales: bool = True
) -> tuple[JointView, JointCut]:
    view = any_view(random, scales=scales)
    (cut,) = view.cuts([picture], random.integers(0, 50, 1), int(random.integers(9)))
    assert cut.size == view.out_size(picture)
    return view, cut


def any_picture(random: Random) -> tuple[int, int]:
    width, height = random.integers(6, 90, 2).tolist()
    return width, height


def of_torchvision(image: Image.Image, cut: JointCut, nearest: bool, fill: int) -> np.ndarray:
    """The same cut of a Pillow image in torchvision's operations."""
    mode = InterpolationMode.NEAREST if nearest else InterpolationMode.BILINEAR
    image = tv.resize(image, [cut.resized[1], cut.resized[0]], mode)
    around = 200
    image = tv.pad(image, [around], fill=fill)
    (left, top), (width, height) = cut.corner, cut.window
    image = tv.crop(image, top + around, left + around, height, width)
    if cut.flip:
        image = tv.horizontal_flip(image)
    more = [0, 0, cut.size[0] - width, cut.size[1] - height]
    return np.asarray(tv.pad(image, more, fill=fill))


@pytest.mark.parametrize("round", ROUNDS)
def test_the_bytes_are_torchvisions(random, round):
    width, height = any_picture(random)
    _, cut = any_cut(random, (width, height))
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    labels_HW = random.integers(0, 19, (height, width), dtype=np.uint8)
    image = Image.fromarray(pixels)
    np.testing.assert_array_equal(cut.of_image(image), of_torchvision(image, cut, False, 0))
    expected_HW = of_torchvision(Image.fromarray(labels_HW), cut, True, NO_CLASS)
    np.testing.assert_array_equal(cut.of_labels(labels_HW), expected_HW)


@pytest.mark.parametrize("round", ROUNDS)
def test_labels_never_pass_an_interpolation(random, round):
    width, height = any_picture(random)
    _, cut = any_cut(random, (width, height))
    # Far apart, so that every blend of two would be another number.
    used = random.choice(255, 3, replace=False).astype(np.uint8)
    labels_HW = used[random.integers(0, 3, (height, width))]
    found = cut.of_labels(labels_HW)
    assert found.dtype == np.uint8 and found.shape == cut.size[::-1]
    assert set(np.unique(found).tolist()) <= {*used.tolist(), NO_CLASS}
    for stride in (2, 4):
        assert set(np.unique(at_stride(found, stride)).tolist()) <= {*used.tolist(), NO_CLASS}


@pytest.mark.parametrize("round", ROUNDS)
def test_labels_stay_with_their_pixels(random, round):
    """Pictures and labels that say where a pixel was: in x and in y."""
    width, height = any_picture(random)
    _, cut = any_cut(random, (width, height))
    x_HW = np.broadcast_to(np.arange(width, dtype=np.uint8), (height, width))
    y_HW = np.broadcast_to(np.arange(height, dtype=np.uint8)[:, None], (height, width))
    pixels = cut.of_image(Image.fromarray(np.stack([x_HW, y_HW, x_HW], -1)))
    for channel, (code_HW, side, resized) in enumerate(
        ((x_HW, width, cut.resized[0]), (y_HW, height, cut.resized[1]))
    ):
        labels_HW = cut.of_labels(np.ascontiguousarray(code_HW))
        known_HW = labels_HW != NO_CLASS
        apart = pixels[..., channel].astype(int) - labels_HW
        # A new pixel covers so many old ones; at the edge the filter has half of them.
        assert np.abs(apart[known_HW]).max(initial=0) <= 1 + side / resized
        assert (pixels[~known_HW] == 0).all()


@pytest.mark.parametrize("round", ROUNDS)
def test_without_resizing_every_pixel_is_that_of_its_label(random, round):
    width, height = any_picture(random)
    view, cut = any_cut(random, (width, height), scales=False)
    labels_HW = random.integers(0, 250, (height, width), dtype=np.uint8)
    pixels = np.stack([labels_HW, 255 - labels_HW, labels_HW], -1)
    shown, labels = cut.of_image(Image.fromarray(pixels)), cut.of_labels(labels_HW)
    known = labels != NO_CLASS
    assert (shown[known][:, 0] == labels[known]).all()
    assert (shown[known][:, 1] == 255 - labels[known]).all()
    if view.padding == 0 and (view.window is None or not view.train):
        assert known.sum() == width * height


def test_evaluation_shows_every_pixel_once():
    view = JointView(short_side=None, multiple=8, train=False, flip=True, padding=4, window=(5, 5))
    labels_HW = np.arange(13 * 17, dtype=np.uint8).reshape(13, 17)
    (cut,) = view.cuts([(17, 13)], np.array([3]), 2)
    found = cut.of_labels(labels_HW)
    assert found.shape == (16, 24) and (found != NO_CLASS).sum() == 13 * 17
    np.testing.assert_array_equal(found[:13, :17], labels_HW)


def test_padding_shifts_by_up_to_its_width():
    """ERFNet's: up to two pixels in every direction, with equal frequency."""
    view = JointView(None, 1, train=True, num_ids=4000, padding=2)
    ids = np.arange(4000)
    cuts = view.cuts([(20, 10)] * 4000, ids, 0)
    for place in range(2):
        values, counts = np.unique([cut.corner[place] for cut in cuts], return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        # 800 each, with a deviation of 25
        assert abs(counts - 800).max() < 110
    assert {cut.size for cut in cuts} == {(20, 10)} and not any(cut.flip for cut in cuts)


def test_scales_windows_and_mirrors_are_spread():
    view = JointView(None, 1, True, num_ids=2000, flip=True, scale=(0.5, 2.0), window=(30, 20))
    cuts = view.cuts([(40, 40)] * 2000, np.arange(2000), 5)
    widths = np.array([cut.resized[0] for cut in cuts])
    assert widths.min() == 20 and widths.max() == 80 and abs(widths.mean() - 50) < 2
    assert abs(np.mean([cut.flip for cut in cuts]) - 0.5) < 0.05
    for cut in cuts:
        for side, window, place in zip(cut.resized, cut.window, cut.corner, strict=True):
            assert min(0, side - window) <= place <= max(0, side - window)
    assert {cut.size for cut in cuts} == {(30, 20)}


def test_a_cut_follows_from_seed_epoch_and_id_alone():
    view = JointView(None, 8, True, seed=3, num_ids=40, padding=4, flip=True, scale=(0.5, 2.0))
    ids = np.array([7, 0, 39, 12])
    together = view.cuts([(30, 20)] * 4, ids, 6)
    alone = [view.cuts([(30, 20)], np.array([id]), 6)[0] for id in ids.tolist()]
    assert together == alone
    assert view.cuts([(30, 20)] * 4, ids, 7) != together


def test_short_sides_are_torchvisions(random):
    for _ in ROUNDS:
        width, height = any_picture(random)
        side = int(random.integers(5, 60))
        view = JointView(side, 1, train=False)
        resized = tv.resize(Image.new("RGB", (width, height)), [side])
        assert view.shown((width, height)) == resized.size


def test_labels_at_a_stride_are_pillows_nearest(random):
    labels_HW = random.integers(0, 19, (32, 48), dtype=np.uint8)
    for stride in (1, 2, 4, 8):
        small = Image.fromarray(labels_HW).resize((48 // stride, 32 // stride), Image.NEAREST)
        np.testing.assert_array_equal(at_stride(labels_HW, stride), np.asarray(small))
