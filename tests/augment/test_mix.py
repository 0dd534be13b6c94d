"""x' against the released code's own numbers, and against the promise that ranks do not matter."""

import numpy as np
import pytest
import torch

from fastkd.augment.mix import MixDraw, cut_box, draw_mix
from fastkd.augment.views import ViewMaker
from fastkd.compute.collectives import split_evenly
from fastkd.data.batch import Batch
from fastkd.data.loaders.resident import ResidentLoader
from fastkd.data.picture_views import PICTURE_VIEWS
from fastkd.data.sources.synthetic import make_synthetic
from fastkd.testing.loading import loading, placed

# Computed by the released code of the KD x data augmentation paper (utils of its CutMix).
# side, lam, centre x, centre y -> x1, y1, x2, y2, share of the image that stays
BOXES = [
    (32, 0.5, 16, 16, (5, 5, 27, 27), 0.52734375),
    (32, 0.5, 2, 30, (0, 19, 13, 32), 0.8349609375),
    (32, 0.9, 31, 0, (26, 0, 32, 5), 0.970703125),
    (32, 0.999, 10, 10, (10, 10, 10, 10), 1.0),
    (32, 0.0, 5, 5, (0, 0, 21, 21), 0.5693359375),
    (64, 0.3, 40, 10, (14, 0, 64, 36), 0.560546875),
    (224, 0.75, 100, 200, (44, 144, 156, 224), 0.8214285714285714),
]
# side -> expected share of the image that is replaced, probability of an empty box (lam ~ U(0, 1))
SHARES = {
    32: (0.29925063252449036, 0.00390625),
    64: (0.31009714398533106, 0.0009765625),
    224: (0.3177778002652902, 7.971938775510203e-05),
}


def area(draw):
    top, bottom, left, right = draw.box
    return (bottom - top) * (right - left)


@pytest.mark.parametrize(("side", "lam", "x", "y", "box", "stays"), BOXES)
def test_the_box_is_that_of_the_released_code(side, lam, x, y, box, stays):
    x1, y1, x2, y2 = box
    assert cut_box(side, lam, y, x) == (y1, y2, x1, x2)
    draw = MixDraw(lam, cut_box(side, lam, y, x), np.array([1, 0]))
    assert draw.stays(side) == pytest.approx(stays, abs=1e-12)


@pytest.mark.parametrize("side", SHARES)
def test_boxes_cover_what_the_released_code_covers(side):
    num = 4000
    draws = [draw_mix("cutmix", seed=0, epoch=0, step=n, num=2, side=side) for n in range(num)]
    shares = np.array([area(draw) for draw in draws]) / side**2
    expected, empty = SHARES[side]
    # Four standard errors each.
    assert abs(shares.mean() - expected) < 4 * shares.std() / num**0.5
    assert abs((shares == 0).mean() - empty) < 4 * (empty / num) ** 0.5


@pytest.mark.parametrize("num", [2, 3, 50])
def test_cutmix_never_pairs_a_sample_with_itself(num):
    for step in range(50):
        partner_N = draw_mix("cutmix", seed=1, epoch=0, step=step, num=num, side=8).partner_N
        assert sorted(partner_N) == list(range(num))
        assert not (partner_N == np.arange(num)).any()


def test_every_derangement_is_equally_likely():
    counts = {}
    for step in range(900):
        partner_N = draw_mix("cutmix", seed=2, epoch=0, step=step, num=4, side=8).partner_N
        counts[tuple(partner_N)] = counts.get(tuple(partner_N), 0) + 1
    assert len(counts) == 9  # of four elements
    assert 60 < min(counts.values()) <= max(counts.values()) < 145  # 100 each, four sigma


def test_a_batch_of_one_has_nobody_else():
    assert draw_mix("cutmix", seed=0, epoch=0, step=0, num=1, side=8).partner_N.tolist() == [0]


def test_mixup_takes_any_permutation_and_no_box():
    draws = [draw_mix("mixup", seed=0, epoch=0, step=n, num=3, side=8) for n in range(200)]
    assert {tuple(draw.partner_N) for draw in draws} == {
        (a, b, c) for a in range(3) for b in range(3) for c in range(3) if len({a, b, c}) == 3
    }
    assert all(draw.box is None for draw in draws)
    assert abs(np.mean([draw.lam for draw in draws]) - 0.5) < 4 * (1 / 12 / 200) ** 0.5


@pytest.mark.parametrize(("side", "hole"), [(32, 8), (64, 16), (224, 56)])
def test_cutout_takes_one_square_of_a_quarter_of_the_side(side, hole):
    """As the released code: the centre anywhere, what lies outside of the image is not there."""
    seen = set()
    for step in range(60):
        draw = draw_mix("cutout", seed=0, epoch=0, step=step, num=4, side=side)
        assert draw.partner_N is None and draw.stays(side) == 1
        top, bottom, left, right = draw.box
        for low, high in ((top, bottom), (left, right)):
            assert 0 <= low < high <= side
            assert high - low == hole or (low == 0 or high == side)
            assert hole // 2 <= high - low <= hole
        seen.add((top, left))
    assert len(seen) > 40


def test_cutout_makes_the_same_hole_in_every_image_and_nothing_else():
    torch.manual_seed(0)
    x = torch.randn(5, 3, 32, 32)
    made = view_maker("cutout")(Batch(x, torch.arange(5), torch.arange(5)), 0, 7)["xprime"]
    top, bottom, left, right = draw_mix("cutout", seed=0, epoch=0, step=7, num=5, side=32).box
    expected = x.clone()
    expected[:, :, top:bottom, left:right] = 0
    assert torch.equal(made, expected)


def test_a_draw_follows_from_seed_epoch_and_step():
    def draw(**changes):
        where = {"seed": 0, "epoch": 3, "step": 5} | changes
        return draw_mix("cutmix", **where, num=8, side=32)

    assert draw().lam == draw().lam
    assert (draw().partner_N == draw().partner_N).all()
    others = [draw(seed=1), draw(epoch=4), draw(step=6)]
    assert len({found.lam for found in [draw(), *others]}) == 4


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="x' is made by cutmix, mixup, cutout, got 'erase'"):
        draw_mix("erase", seed=0, epoch=0, step=0, num=4, side=8)


def loader(rank, world_size):
    return ResidentLoader(make_synthetic("train", 8), loading(rank, world_size))


def view_maker(kind, placement=None, layout=torch.channels_last, **options):
    return ViewMaker(kind, seed=0, placement=placement or placed(), layout=layout, **options)


@pytest.mark.parametrize("kind", ["cutmix", "mixup", "cutout"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_views_do_not_depend_on_the_number_of_ranks(kind, ranks, monkeypatch):
    whole = next(loader(0, 1).epoch(2, start_step=4))

    def views(rank, world_size):
        part = next(loader(rank, world_size).epoch(2, start_step=4))
        sizes = split_evenly(10, world_size)
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

        def exchanged(rows_NHWC, partner_N, rows_of_ranks):
            # Stands in for the other processes (partners_on_ranks.py has real ones).
            assert tuple(rows_of_ranks) == sizes and len(rows_NHWC) == sizes[rank]
            return whole.images_NCHW.permute(0, 2, 3, 1)[torch.from_numpy(partner_N[mine])]

        monkeypatch.setattr("fastkd.augment.views.rows_of_partners", exchanged)
        return view_maker(kind, placed(rank, world_size), joined=world_size > 1)(part, 2, 4)

    alone = views(0, 1)
    parts = [views(rank, ranks) for rank in range(ranks)]
    for view in ("x", "xprime"):
        assert torch.equal(torch.cat([part[view] for part in parts]), alone[view])
    assert not torch.equal(alone["x"], alone["xprime"])


def test_without_a_second_view_there_is_only_x():
    batch = next(loader(0, 1).epoch(0))
    make = view_maker("none")
    assert list(make(batch, 0, 0)) == ["x"]
    assert torch.equal(make(batch, 0, 0)["x"], batch.images_NCHW)


@pytest.mark.parametrize("kind", PICTURE_VIEWS)
def test_a_loader_that_was_not_opened_for_the_view_is_refused(kind):
    make, part = view_maker(kind, pool=2), loader(0, 1)
    with pytest.raises(ValueError, match=f"x' is {kind}, but the loader shows x only"):
        make(next(part.epoch(0)), 0, 0)
    views = make(next(make.opened(part).epoch(0)), 0, 0)
    assert (len(views["x"]), len(views["xprime"])) == (10, 20)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["cutmix", "mixup", "cutout"])
def test_all_views_have_one_layout_and_one_dtype(kind, precision, layout):
    make = view_maker(kind, placed(1, 2, precision), layout)
    views = make(next(make.opened(loader(1, 2)).epoch(0)), 0, 0)
    for view in views.values():
        assert view.dtype == make.placement.dtype
        assert view.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_labels_and_logits_are_mixed_like_the_pixels(kind):
    """Images of one colour: the mean of x' tells in which shares it is made of two of them."""
    colours = torch.tensor([1.0, 10.0, 100.0])
    labels_N = torch.tensor([0, 2, 1, 2, 0, 1, 1])
    x = colours[labels_N].view(-1, 1, 1, 1).expand(-1, 3, 9, 9).contiguous()
    batch = Batch(x, labels_N, torch.arange(7))
    logits_NC = torch.stack([colours[labels_N], -2 * colours[labels_N]], 1)
    make = view_maker(
        kind,
        layout=torch.contiguous_format,
        pool=3,
        mixes=("labels", "logits"),
        num_classes=3,
    )
    differ = 0
    for step in range(8):
        shown = make(batch, 1, step)["xprime"].double().mean((1, 2, 3))
        found = make.xprime_targets(batch, {"x/teacher/logits": logits_NC.bfloat16()}, 1, step)
        soft_NC = found["xprime/mixed/labels"]
        assert soft_NC.shape == (21, 3)
        torch.testing.assert_close(soft_NC.sum(1), torch.ones(21))
        torch.testing.assert_close((soft_NC * colours).sum(1).double(), shown, rtol=1e-5, atol=0)
        mixed_NC = found["xprime/mixed/logits"]
        assert mixed_NC.dtype == torch.float32
        expected = torch.stack([shown, -2 * shown], 1).float()
        torch.testing.assert_close(mixed_NC, expected, rtol=1e-5, atol=0)
        differ += int((soft_NC.max(1).values < 1).sum())
    assert differ > 50


@pytest.mark.parametrize("kind", ["cutout", *PICTURE_VIEWS])
def test_a_view_of_one_image_has_its_label(kind):
    batch = Batch(torch.zeros(4, 3, 8, 8), torch.tensor([2, 0, 1, 2]), torch.arange(4))
    maker = view_maker(
        kind,
        pool=2,
        mixes=("labels",),
        num_classes=3,
    )
    found = maker.xprime_targets(batch, {}, 0, 0)["xprime/mixed/labels"]
    assert found.argmax(1).tolist() == [2, 0, 1, 2] * 2
    assert found.sum().item() == 8 and found.max().item() == 1
