"""mIoU: every labelled pixel once, as whole numbers, for every batch size and number of ranks.

The truths are torchmetrics and, for the rule on classes that do not occur, plain numpy.
"""

import json
import math
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

import fastkd.evaluation.evaluate
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data.batch import NO_LABEL, Batch
from fastkd.errors import UserError
from fastkd.evaluation.chance import chance_of, class_counts
from fastkd.evaluation.confusion import confused, of_confusion
from fastkd.evaluation.evaluate import evaluate
from fastkd.evaluation.headline import HEADLINES, headline, of_epoch

from .pixel_maps import Maps, as_it_is, example

FP32 = Precision("fp32", "cpu")


def world(rank=0, size=1):
    return World(rank, rank, size, torch.device("cpu"), "gloo" if size > 1 else None)


def found_in(logits_NCHW, labels_NHW, **how):
    return evaluate(as_it_is, Maps(logits_NCHW, labels_NHW, **how), FP32, world(), "pixel")


def without_loss(found):
    return {name: value for name, value in found.items() if name != "loss"}


def by_numpy(predicted_NHW, labels_NHW, classes):
    """Class by class, over sets of pixels."""
    predicted, labels = predicted_NHW.numpy(), labels_NHW.numpy()
    known = labels >= 0
    found = []
    for number in range(classes):
        ours, theirs = (predicted == number) & known, labels == number
        union = (ours | theirs).sum()
        found.append((ours & theirs).sum() / union if union else None)
    return found


@pytest.mark.parametrize("classes", [2, 5, 19])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_the_scores_are_those_of_torchmetrics(classes, ignored):
    logits, labels = example(classes=classes, ignored=ignored)
    found = found_in(logits, labels)
    options = {"num_classes": classes, "ignore_index": NO_LABEL}
    for name, metric in {
        "miou": MulticlassJaccardIndex(average="macro", **options),
        "pixel_accuracy": MulticlassAccuracy(average="micro", **options),
    }.items():
        assert found[name] == pytest.approx(metric(logits, labels).item(), rel=1e-5)
    each = MulticlassJaccardIndex(average=None, **options)(logits, labels)
    assert found["class_iou"] == pytest.approx(each.tolist(), rel=1e-5)
    assert found["loss"] == pytest.approx(
        F.cross_entropy(logits.double(), labels, ignore_index=NO_LABEL).item(), rel=1e-6
    )
    assert found["samples"] == len(labels)
    assert isinstance(found["samples"], int)


def test_a_class_counts_if_it_is_labelled_or_predicted():
    # 0 and 1 are right and wrong, 2 is only predicted, 3 only labelled, 4 does not occur.
    labels = torch.tensor([[[0, 0, 1, 3, NO_LABEL]]])
    predicted = torch.tensor([[[0, 1, 1, 2, 4]]])
    logits = F.one_hot(predicted, 5).permute(0, 3, 1, 2).float()
    found = found_in(logits, labels)
    assert found["class_iou"] == [0.5, 0.5, 0.0, 0.0, None]
    assert found["miou"] == 0.25
    assert found["pixel_accuracy"] == 0.5
    # torchmetrics leaves out what does not occur, too, and calls it 0 where it lists the classes.
    whole = MulticlassJaccardIndex(num_classes=5, average="macro", ignore_index=NO_LABEL)
    assert found["miou"] == pytest.approx(whole(logits, labels).item())


@pytest.mark.parametrize("seed", range(4))
def test_and_so_says_plain_numpy(seed):
    logits, labels = example(num=2, classes=30, size=(3, 4), seed=seed)
    found = found_in(logits, labels)
    expected = by_numpy(logits.argmax(1), labels, 30)
    assert found["class_iou"] == expected
    occurring = [iou for iou in expected if iou is not None]
    assert found["miou"] == pytest.approx(np.mean(occurring), rel=1e-12)
    assert None in expected


@pytest.mark.parametrize("batch_size", [1, 2, 4, 50])
def test_no_batch_size_changes_a_pixel(batch_size):
    logits, labels = example()
    one, other = found_in(logits, labels), found_in(logits, labels, batch_size=batch_size)
    assert one.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-6)
    assert one == other


@pytest.mark.parametrize("size", [2, 3, 4])
def test_nor_does_the_number_of_ranks(size, monkeypatch):
    logits, labels = example()
    whole = found_in(logits, labels)
    module = fastkd.evaluation.evaluate
    shares = []
    monkeypatch.setattr(module, "on_ranks", lambda value, world: [5] * world.size)
    monkeypatch.setattr(module, "all_reduce_sum", lambda sums: shares.append(sums.clone()))

    def of(rank):
        maps = Maps(logits, labels, batch_size=2, rank=rank, size=size)
        return evaluate(as_it_is, maps, FP32, world(rank, size), "pixel")

    for rank in range(size):
        # In batches of two, ranks beyond the second get no image.
        with suppress(UserError):
            of(rank)
    assert [share.dtype for share in shares] == [torch.int64, torch.float64] * size
    totals = [torch.stack(shares[first::2]).sum(0) for first in (0, 1)]
    assert torch.equal(totals[0], confused(logits.argmax(1), labels, 5))
    monkeypatch.setattr(
        module,
        "all_reduce_sum",
        lambda sums: sums.copy_(totals[0] if sums.dtype == torch.int64 else totals[1]),
    )
    for rank in range(size):
        found = of(rank)
        assert found.pop("loss") == pytest.approx(whole["loss"], rel=1e-6)
        assert found == without_loss(whole)


def test_real_ranks_of_which_one_has_no_image_agree(ranks):
    said = ranks(3, "confusion_on_ranks.py")
    one, *others = [json.loads(each.out) for each in said]
    assert others == [one, one]
    logits, labels = example(num=2)
    whole = found_in(logits, labels)
    assert one.pop("loss") == pytest.approx(whole.pop("loss"), rel=1e-6)
    assert one == whole


def test_ignored_pixels_are_no_answers():
    logits, labels = example(ignored=0.5)
    other = logits.clone()
    other.permute(0, 2, 3, 1)[labels == NO_LABEL] = 100 * torch.randn(5)
    assert found_in(other, labels) == found_in(logits, labels)
    # Any negative number is none, and an image without a label is no sample.
    labels[0] = -1
    found = found_in(logits, labels)
    assert found["samples"] == len(labels) - 1
    assert without_loss(found) == without_loss(found_in(logits[1:], labels[1:]))
    with pytest.raises(UserError, match="none has a label"):
        found_in(logits, torch.full_like(labels, NO_LABEL))


@pytest.mark.parametrize("size", [(3, 4), (12, 18), (6, 5), (1, 1)])
def test_logits_come_to_the_size_of_the_labels(size):
    logits, labels = example()
    logits = F.interpolate(logits, size, mode="nearest")
    resized = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    found = found_in(logits, labels)
    assert found == found_in(resized, labels)
    assert found["class_iou"] == by_numpy(resized.argmax(1), labels, 5)


def test_batches_may_have_images_of_several_sizes():
    small, large = example(num=2, size=(4, 4)), example(num=3, size=(5, 8), seed=1)

    class Both:
        def epoch(self, epoch, start_step=0):
            for logits, labels in (small, large):
                yield Batch(logits, labels, torch.zeros(0))

    found = evaluate(as_it_is, Both(), FP32, world(), "pixel")
    counts = sum(confused(logits.argmax(1), labels, 5) for logits, labels in (small, large))
    assert {name: found[name] for name in of_confusion(counts)} == of_confusion(counts)


def test_the_counts_are_exact_where_float32_would_not_be():
    counts = torch.tensor([[2**40 + 1, 0], [1, 2**40]])
    found = of_confusion(counts)
    assert found["class_iou"] == [(2**40 + 1) / (2**40 + 2), 2**40 / (2**40 + 1)]


@pytest.mark.parametrize("shares", [[0.9, 0.1, 0.0], [0.25] * 4, [0.5, 0.3, 0.2], [1.0]])
def test_chance_is_what_answers_reach_that_ignore_the_image(shares):
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor(shares), 400_000, True, generator=generator)
    classes = len(shares)
    blind = {
        "always the commonest": torch.full_like(labels, int(np.argmax(shares))),
        "at random": labels[torch.randperm(len(labels), generator=generator)],
    }
    # Over the classes that are labelled: an answer that never names a class still misses it.
    reached = [
        sum(iou or 0 for iou in by_numpy(one, labels, classes)) / sum(s > 0 for s in shares)
        for one in blind.values()
    ]
    found = of_confusion(confused(labels, labels, classes))
    assert found["chance"] == pytest.approx(max(reached), abs=2e-3)
    chance = chance_of(class_counts(labels[None, None], classes), {"miou": 0.5, **found})
    assert (chance.accuracy, chance.floor) == (found["chance"], found["chance"])
    assert chance.loss == math.log(classes)
    assert chance.beaten_by(1.1 * chance.floor)
    assert not chance.beaten_by(chance.accuracy)


def test_it_is_the_headline_and_the_classes_are_kept_out_of_the_rows():
    logits, labels = example()
    found = found_in(logits, labels)
    assert headline(found) == "miou"
    assert HEADLINES["miou"] == "mIoU"
    row = of_epoch(found)
    assert list(row) == ["val_miou", "val_pixel_accuracy", "val_loss"]
    assert headline(row) == headline({"miou_last": 0.5}) == "miou"
