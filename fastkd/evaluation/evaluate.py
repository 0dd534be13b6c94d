"""Exact metrics on the validation images: every sample once, over all ranks.

Accuracy if an image has one class, mean average precision if it has several labels, mean
intersection over union if its pixels are labelled.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.compute.collectives import all_reduce_sum, gather_rows, on_ranks
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data.batch import IGNORED, NO_LABEL, Batch, LabelKind
from fastkd.errors import UserError
from fastkd.evaluation.confusion import confused, of_confusion
from fastkd.losses.multilabel import known_bce
from fastkd.models.dense import logits_at
from fastkd.models.intake import image_dtype
from fastkd.models.taps import logits_of

__all__ = ["EvalLoader", "answer", "evaluate", "evaluating"]


class EvalLoader(Protocol):
    """This rank's share of the validation images."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Each sample exactly once over all ranks; a rank may get none."""
        ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode within the block; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()  # an overridden train() may not return the model
        yield model
    finally:
        for module, training in modes:
            module.training = training


def evaluate(
    forward: Callable[[Tensor], Any],
    loader: EvalLoader,
    precision: Precision,
    world: World,
    kind: LabelKind = "class",
) -> dict[str, Any]:
    """Metrics over all samples of all ranks, equal on every rank; `fastkd.evaluation.headline`
    names the main one.

    forward: images [N, 3, H, W] -> logits [N, C], of every pixel [N, C, h, w], or what `logits_of`
    finds them in; in evaluation mode already.
    kind: what is labelled; several labels per image are [N, C] in 0, 1 and -1 (unknown).

    One class per image: `accuracy` and `top5` (shares of 1), `loss` (mean cross entropy), over
    the samples with a label: a negative class id means no label.
    Several labels: `map`, the mean over classes of the area under the steps of precision over
    recall (torchmetrics; not VOC's older 11 points), of classes with at least one positive, without
    unknown labels; `loss` (mean binary cross entropy); `chance`, the expected mAP of scores
    that carry no information.
    A class per pixel: what `fastkd.evaluation.confusion.of_confusion` says, and `loss` (mean cross
    entropy of the labelled pixels), of logits at the size of the labels. All: `samples`, and
    `unread` if images could not be read, which then do not count (data.on_bad=skip).

    A loss that is not finite because images are not is said once, as a warning.

    Raises:
        UserError: no validation image has a label, or mAP finds labels that it cannot use.
    """
    answers = _Answers(forward, loader, precision)
    found = _METRICS[kind](answers, world)
    if not found["unread"]:
        del found["unread"]
    if not found["samples"]:
        raise UserError(
            "there is no validation sample to evaluate on, or none has a label: give validation "
            "images whose labels are known"
        )
    if not math.isfinite(found["loss"]):
        _tell_of_images(loader, world)
    return found


def _tell_of_images(loader: EvalLoader, world: World) -> None:
    """A warning if images are not finite. They are read once more, so only where a loss is not."""
    broken = num = 0
    for batch in loader.epoch(0):
        fine_N = batch.images_NCHW.flatten(1).isfinite().all(1)
        broken += int((~fine_N).sum())
        num += len(fine_N)
    broken, num = (sum(on_ranks(count, world)) for count in (broken, num))
    if broken and world.rank == 0:
        warnings.warn(
            f"{broken} of {num} validation images hold pixels that are NaN or infinite, and the "
            f"loss is not finite because of them: look at what makes these images, such as a "
            f"division by 0",
            stacklevel=2,
        )


@dataclass
class _Answers:
    """fp32 logits and labels of every batch."""

    forward: Callable[[Tensor], Any]
    loader: EvalLoader
    precision: Precision
    unread: int = 0
    """Images so far that could not be read."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with torch.no_grad():
            for batch in self.loader.epoch(0):
                self.unread += len(batch.unread)
                yield answer(self.forward, batch.images_NCHW, self.precision), batch.labels_N


def answer(forward: Callable[[Tensor], Any], images_NCHW: Tensor, precision: Precision) -> Tensor:
    """fp32 logits of images on the network's device."""
    with precision.autocast():
        return logits_of(forward(images_NCHW.to(image_dtype(forward, precision)))).float()


def _counted(answers: _Answers, world: World) -> dict[str, float]:
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)
    for logits_NC, labels_N in answers:
        labels_N = torch.where(labels_N < 0, NO_LABEL, labels_N)
        top = logits_NC.topk(min(5, logits_NC.shape[1]), dim=1).indices
        hits = top == labels_N[:, None]
        sums[0] += hits[:, 0].sum()
        sums[1] += hits.any(1).sum()
        loss = F.cross_entropy(logits_NC, labels_N, ignore_index=NO_LABEL, reduction="sum")
        sums[2] += loss.double()
        sums[3] += (labels_N != NO_LABEL).sum()
    sums[4] = answers.unread
    if world.size > 1:
        all_reduce_sum(sums)
    correct, correct5, loss, count, unread = sums.tolist()
    whole = max(count, 1)
    return {
        "accuracy": correct / whole,
        "top5": correct5 / whole,
        "loss": loss / whole,
        "samples": int(count),
        "unread": int(unread),
    }


def _ranked(answers: _Answers, world: World) -> dict[str, float]:
    """mAP depends on the order of all samples, so all ranks get all scores."""
    from torchmetrics.functional.classification import binary_average_precision

    pairs = [torch.cat([logits, labels.to(logits.dtype)], 1) for logits, labels in answers]
    own = torch.cat(pairs) if pairs else None
    rows, unread = gather_rows(own, world), sum(on_ranks(answers.unread, world))
    if rows is None:
        return {"samples": 0, "unread": 0}
    logits_NC, targets_NC = rows.double().cpu().chunk(2, 1)
    known_NC = targets_NC != IGNORED
    wrong = targets_NC[known_NC & (targets_NC != 0) & (targets_NC != 1)]
    if len(wrong):
        raise UserError(
            "mAP wants labels of 0, 1 and -1 (unknown), and the validation labels hold others, "
            f"such as {wrong[0].item():g}"
        )
    positives_C = (targets_NC == 1).sum(0)
    judged_C = positives_C > 0
    if not judged_C.any():
        raise UserError("mAP wants a positive label, and the validation images have none")
    # Class by class: torchmetrics' multilabel form needs at least two.
    average_precisions = [
        binary_average_precision(_places(logits_N), targets_N.long(), ignore_index=int(IGNORED))
        for logits_N, targets_N in zip(
            logits_NC[:, judged_C].T, targets_NC[:, judged_C].T, strict=True
        )
    ]
    loss, known = known_bce(logits_NC, targets_NC)
    share_C = positives_C / known_NC.sum(0).clamp(min=1)
    return {
        "map": torch.stack(average_precisions).double().mean().item(),
        "loss": (loss / known).item(),
        "chance": share_C[judged_C].double().mean().item(),
        "samples": len(targets_NC) - unread,
        "unread": unread,
    }


def _confused(answers: _Answers, world: World) -> dict[str, Any]:
    """Pixels by label and prediction are whole numbers: the same for every batch and rank."""
    counts_CC: Tensor | None = None
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    for logits_NCHW, labels_NHW in answers:
        logits_NCHW = logits_at(logits_NCHW, (labels_NHW.shape[1], labels_NHW.shape[2]))
        labels_NHW = torch.where(labels_NHW < 0, NO_LABEL, labels_NHW)
        found = confused(logits_NCHW.argmax(1), labels_NHW, logits_NCHW.shape[1])
        counts_CC = found if counts_CC is None else counts_CC + found
        loss = F.cross_entropy(logits_NCHW, labels_NHW, ignore_index=NO_LABEL, reduction="sum")
        sums[0] += loss.double()
        sums[1] += (labels_NHW != NO_LABEL).flatten(1).any(1).sum()
    sums[2] = answers.unread
    if world.size > 1:
        # A rank without an image does not know the number of classes.
        sizes = on_ranks(0 if counts_CC is None else len(counts_CC), world)
        if counts_CC is None:
            counts_CC = torch.zeros(max(sizes), max(sizes), dtype=torch.int64, device=world.device)
        all_reduce_sum(counts_CC)
        all_reduce_sum(sums)
    loss, images, unread = sums.tolist()
    if counts_CC is None:
        return {"samples": 0, "unread": 0}
    found = of_confusion(counts_CC)
    pixels = max(int(counts_CC.sum()), 1)
    return {**found, "loss": loss / pixels, "samples": int(images), "unread": int(unread)}


_METRICS = {"class": _counted, "multi": _ranked, "pixel": _confused}


def _places(logits_N: Tensor) -> Tensor:
    """The rank of each sample by score, in 0..1; equal scores share a rank.

    Only the order matters. torchmetrics takes the sigmoid of anything outside of 0..1, which in
    fp32 is 1 for every large logit: the order would be lost.
    """
    return torch.unique(logits_N, return_inverse=True)[1].double() / len(logits_N)
