"""x is mixed with its labels, alike on every number of ranks; sizes, repeats and refusals."""

import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fastkd.augment.config import AugmentConfig
from fastkd.augment.mix import Mixing, draw_x_mix
from fastkd.augment.views import ViewMaker, resized
from fastkd.compute.collectives import split_evenly
from fastkd.data.batch import Batch
from fastkd.data.draws import ERASE, POLICY, sample_words
from fastkd.data.finish import Look
from fastkd.data.loaders.planned import Loading
from fastkd.data.loaders.resident import ResidentLoader
from fastkd.data.loaders.torch_loader import TorchLoader
from fastkd.data.picture_views import PictureView
from fastkd.data.policies.erasing import WORDS_PER_RECTANGLE, erase, rectangles
from fastkd.data.policies.policy import make_policy
from fastkd.data.sources.synthetic import make_synthetic
from fastkd.errors import UserError
from fastkd.losses import BinaryCrossEntropy, CrossEntropy
from fastkd.recipes.loading import load_recipe
from fastkd.testing.loading import loading
from fastkd.training.matching import check_augmentation, check_labels


def maker(mixing: Mixing, given: Loading, **options: Any) -> ViewMaker:
    layout = torch.contiguous_format
    return ViewMaker(
        "none",
        seed=0,
        placement=given.placement,
        layout=layout,
        mixing=mixing,
        num_classes=10,
        **options,
    )


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.4), Mixing(cutmix=1.0), Mixing(0.2, 1.0, 0.6)])
def test_labels_are_mixed_like_the_pixels(mixing: Mixing) -> None:
    """Images of one colour: the mean of x tells in which shares it is made of two of them."""
    colours = torch.arange(10).float() ** 2
    labels_N = torch.tensor([0, 2, 9, 4, 5, 7, 1])
    x = colours[labels_N].view(-1, 1, 1, 1).expand(-1, 3, 9, 9).contiguous()
    make, mixed = maker(mixing, loading()), 0
    for step in range(20):
        batch = make.mixed(Batch(x, labels_N, torch.arange(7), global_size=7), 1, step)
        assert batch.labels_N.dtype == torch.float32 and batch.labels_N.shape == (7, 10)
        torch.testing.assert_close(batch.labels_N.sum(1), torch.ones(7))
        shown = batch.images_NCHW.mean((1, 2, 3))
        torch.testing.assert_close((batch.labels_N * colours).sum(1), shown, rtol=1e-5, atol=1e-4)
        views = make(batch, 1, step)
        assert list(views) == ["x"] and torch.equal(views["x"], batch.images_NCHW)
        mixed += int((batch.labels_N.max(1).values < 1).any())
    assert mixed >= 8
    if mixing.share < 1:
        assert mixed < 20


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 3.0])
def test_lambda_is_of_the_beta_distribution(alpha: float) -> None:
    draws = [
        draw_x_mix(Mixing(mixup=alpha), seed=1, epoch=0, step=step, num=2, side=8)
        for step in range(4000)
    ]
    lam = np.array([draw.lam for draw in draws if draw])
    assert len(lam) == 4000
    # Mean 1/2, variance 1 / (4 (2 alpha + 1)); fourth moments bound the error of the variance.
    assert abs(lam.mean() - 0.5) < 4 * lam.std() / 4000**0.5
    assert lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


def test_both_kinds_and_neither_come_as_often_as_asked() -> None:
    mixing = Mixing(0.2, 1.0, 0.75)
    draws = [draw_x_mix(mixing, seed=3, epoch=1, step=n, num=4, side=8) for n in range(3000)]
    found = Counter("none" if d is None else "mixup" if d.box is None else "cutmix" for d in draws)
    for kind, share in (("none", 0.25), ("mixup", 0.375), ("cutmix", 0.375)):
        assert abs(found[kind] / 3000 - share) < 0.04


@pytest.mark.parametrize("mixing", [Mixing(mixup=1.0), Mixing(0.2, 1.0, 0.5)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_mixed_batches_do_not_depend_on_the_number_of_ranks(
    mixing: Mixing, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, alone = make_synthetic("train", 8), loading()
    plain = list(islice(ResidentLoader(images, alone).epoch(2), 4))
    whole = [maker(mixing, alone).mixed(batch, 2, step) for step, batch in enumerate(plain)]
    for step, everyone in enumerate(plain):
        parts = []
        for rank in range(ranks):
            given = loading(rank, ranks)
            sizes = split_evenly(10, ranks)
            mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

            def exchanged(rows: Any, partner_N: Any, _: Any, of: Any = (everyone, mine)) -> Any:
                # Stands in for the other processes (partners_on_ranks.py has real ones).
                batch, part = of
                all_rows = batch.labels_N
                if rows.dim() == 4:
                    all_rows = batch.images_NCHW.permute(0, 2, 3, 1)
                return all_rows[torch.from_numpy(partner_N[part])]

            monkeypatch.setattr("fastkd.augment.views.rows_of_partners", exchanged)
            batch = next(ResidentLoader(images, given).epoch(2, step))
            parts.append(maker(mixing, given, joined=True).mixed(batch, 2, step))
        assert torch.equal(torch.cat([p.images_NCHW for p in parts]), whole[step].images_NCHW)
        assert torch.equal(torch.cat([p.labels_N for p in parts]), whole[step].labels_N)


def test_sizes_follow_the_epoch_in_equal_parts() -> None:
    make = maker(Mixing(), loading(), sizes=(4, 6, 8), epochs=7)
    assert [make.side(epoch) for epoch in range(7)] == [4, 4, 4, 6, 6, 8, 8]
    batch = Batch(torch.randn(2, 3, 8, 8), torch.zeros(2).long(), torch.arange(2), global_size=2)
    shown = [make(batch, epoch, 0)["x"] for epoch in range(7)]
    assert [view.shape[-1] for view in shown] == [4, 4, 4, 6, 6, 8, 8]
    assert torch.equal(shown[6], batch.images_NCHW)
    # Means of a plane survive, and edges are not invented.
    plane = torch.full((1, 3, 8, 8), 0.7)
    torch.testing.assert_close(resized(plane, 5), torch.full((1, 3, 5, 5), 0.7))


def look() -> Look:
    return Look(make_policy("trivial"), 0.7)


@pytest.mark.parametrize("backend", ["resident", "torch"])
def test_repeated_images_are_neighbours_and_all_look_different(backend: str) -> None:
    images = make_synthetic("train", 16)
    given = loading(repeats=3, look=look())
    loader: Any
    if backend == "resident":
        loader = ResidentLoader(images, given)
    else:
        loader = TorchLoader(images, given, image_size=16, crop="pad")
    batches = list(loader.epoch(1))
    assert len(batches) == len(images) // 10
    ids = torch.cat([batch.index_N for batch in batches]).numpy()
    shown = torch.cat([batch.images_NCHW for batch in batches])
    counts = Counter(ids.tolist())
    assert max(counts.values()) == 3 and ids.max() < len(images)
    assert len(counts) == -(-len(ids) // 3)
    labels = torch.cat([batch.labels_N for batch in batches]).numpy()
    assert (labels == images.labels_N[ids]).all()
    different = 0
    for first in range(0, 60, 3):
        assert len(set(ids[first : first + 3])) == 1
        different += len(torch.unique(shown[first : first + 3], dim=0)) == 3
    assert different >= 18
    # The first time it looks as without repeats, where it is shown once.
    once = {
        n: image
        for batch in ResidentLoader(images, loading(look=look())).epoch(1)
        for n, image in zip(batch.index_N.tolist(), batch.images_NCHW, strict=True)
    }
    assert all(torch.equal(once[n], shown[3 * k]) for k, n in enumerate(ids[0:60:3].tolist()))
    late = list(loader.epoch(1, 2))
    assert torch.equal(late[0].images_NCHW, batches[2].images_NCHW)


def test_ranks_share_repeated_images() -> None:
    images = make_synthetic("train", 8)
    (whole, *_) = ResidentLoader(images, loading(repeats=2, look=look())).epoch(0)
    parts = [
        next(ResidentLoader(images, loading(rank, 3, repeats=2, look=look())).epoch(0))
        for rank in range(3)
    ]
    assert torch.equal(torch.cat([p.images_NCHW for p in parts]), whole.images_NCHW)


def test_evaluation_is_neither_changed_nor_repeated() -> None:
    images = make_synthetic("val", 8)
    given = loading(repeats=3, look=look(), train=False)
    batches = list(ResidentLoader(images, given).epoch(0))
    plain = list(ResidentLoader(images, loading(train=False)).epoch(0))
    assert torch.cat([b.index_N for b in batches]).tolist() == list(range(len(images)))
    for mine, other in zip(batches, plain, strict=True):
        assert torch.equal(mine.images_NCHW, other.images_NCHW)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mixup": 0.2, "xprime": "cutmix"}, "xprime=cutmix would be made from mixed images"),
        ({"cutmix": 1.0, "xprime": "cropflip"}, "xprime=cropflip would be made from mixed"),
        ({"mix_share": 0.5}, "is for augment.mixup and augment.cutmix"),
        ({"mixup": -1}, "greater than or equal to 0"),
        ({"sizes": [0, 8]}, "greater than 0"),
        ({"repeats": 0}, "greater than 0"),
        ({"cycle": 0}, "greater than 0"),
        ({"cycle": 2, "sizes": (4, 8)}, "and augment.sizes=4,8 others in each part"),
    ],
)
def test_what_would_mix_twice_or_do_nothing_is_refused(keys: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        AugmentConfig.model_validate(keys)


def test_losses_that_need_one_class_are_named() -> None:
    ce, bce = CrossEntropy(), BinaryCrossEntropy()
    check_labels([ce, bce], "class")
    check_augmentation("class", mixed=True, picked=True)
    for loss in ("dkd", "crd", "jointrd"):
        words = [f"losses.{loss}.weight=1", "augment.mixup=0.2"]
        words += {"crd": ["losses.crd.pairs={pooled: pooled}"]}.get(loss, [])
        with pytest.raises(UserError, match=rf"losses\.{loss} needs one class per image, and"):
            load_recipe("quickstart", overrides=words)
    with pytest.raises(UserError, match="these have several"):
        check_augmentation("multi", mixed=True, picked=False)


def test_a_memory_of_each_image_and_repeats_exclude_each_other() -> None:
    words = ["losses.crd.weight=0.8", "losses.crd.pairs={pooled: pooled}", "augment.repeats=2"]
    with pytest.raises(UserError, match=r"augment\.repeats=2 .* losses\.crd keeps one memory"):
        load_recipe("quickstart", overrides=words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["augment.sizes=4,64"], r"sizes=4,64: the images have 32 pixels a side, and 64 is more"),
        (["augment.sizes=8,16,32", "epochs=2"], "has 3 sizes for 2 epochs"),
        (["augment.sizes=1,2,3,4,5"], "a list with at most 4 entries joined by commas"),
        (["augment.repeats=33"], "would fill a batch of 32 with one of .* images"),
        (
            ["augment.sizes=16,32", "student.name=timm:vit_tiny_patch16_224", "student.width=null"],
            "vit_tiny_patch16_224",
        ),
        (["augment.sizes=1,32", "student.name=vgg8", "student.width=null"], "vgg8"),
    ],
)
def test_what_would_fail_in_a_later_epoch_is_refused_before_the_first(
    command: Callable[..., Any], words: list[str], message: str
) -> None:
    small = ["data.name=synthetic", "data.image_size=32", "teacher=null", "losses.kd=null"]
    small += ["losses.ce.weight=1", "baseline.lrs=", "batch_size=32", "epochs=5", "compile=off"]
    said = command("train", "quickstart", *small, *words)
    assert said.code == 2 and "Traceback" not in said.err
    assert re.search(message, said.err) and said.err.count("\n") <= 3


def test_the_gradient_that_is_wrong_at_a_small_size_is_seen(command: Callable[..., Any]) -> None:
    small = ["data.name=synthetic", "data.image_size=32", "teacher=null", "losses.kd=null"]
    small += ["losses.ce.weight=1", "baseline.lrs=", "student.name=resnet18", "precision=bf16"]
    small += ["student.width=0.125", "epochs=2", "augment.sizes=4,32", "device=cpu"]
    said = command("train", "quickstart", *small)
    assert said.code == 2 and "at 4x4 pixels its layer" in said.err


def test_the_student_alone_keeps_the_label_loss_of_the_recipe() -> None:
    words = ["losses.bce.weight=2", "losses.bce.target_threshold=0.2", "losses.kd.ce_weight=0"]
    alone = load_recipe("quickstart", overrides=words).without_teacher("alone")
    (loss,) = alone.losses.values()
    assert dict(loss) == {"weight": 1.0, "label_smoothing": 0.0, "target_threshold": 0.2}


@pytest.mark.parametrize("kind", ["cropflip", "randaugment"])
def test_a_second_view_has_the_policy_of_x_and_its_own_draws(kind: Any) -> None:
    """Made step by step from the parts that have tests of their own."""
    images, given = make_synthetic("train", 16), loading(look=look())
    (batch, *_) = ResidentLoader(images, given).with_views(PictureView(kind, 2)).epoch(1)
    (plain, *_) = ResidentLoader(images, given).epoch(1)
    assert torch.equal(batch.images_NCHW, plain.images_NCHW)
    bare = ResidentLoader(images, loading())
    ids = batch.index_N.numpy()

    def words(stream: int, count: int, appearance: int) -> np.ndarray:
        return sample_words(0, 1, stream, len(images), ids, count, appearance)

    first = given.look.policy
    assert first is not None
    second = make_policy("randaugment")
    assert second is not None
    for appearance, view in enumerate(batch.second_NCHW.split(10), 1):
        crop = bare._crops(batch.index_N, 1, appearance if kind == "cropflip" else 0)
        drawn = appearance if kind == "cropflip" else 0
        shown = first.of(crop, words(POLICY, first.words, drawn))
        if kind == "randaugment":
            shown = second.of(shown, words(POLICY, second.words, appearance))
        wanted = given.normalizer(shown)
        erase(wanted, rectangles(words(ERASE, WORDS_PER_RECTANGLE, appearance), 16, 0.7))
        assert torch.equal(view, wanted)
