"""The row of metrics of an epoch, who is told of it, and a summary of all rows.

Which epoch is the best: `fastkd.training.trainer.Trainer.end_epoch`.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import median_high
from typing import Any

import torch

from fastkd.compute.collectives import sync_buffers
from fastkd.compute.ranks import World, broadcast_object
from fastkd.errors import RunFailed
from fastkd.evaluation.headline import headline
from fastkd.losses.base.term import LossTerm
from fastkd.training.progress import Plan, Progress

__all__ = ["keep_scores", "summary_of", "sync_statistics", "tell", "training_row"]


def sync_statistics(
    student: torch.nn.Module,
    average: torch.nn.Module | None,
    terms: Sequence[LossTerm],
) -> None:
    """Rank 0's buffers on every rank.

    DDP hands out rank 0's batch statistics before each step; evaluation wants them too.
    """
    sync_buffers(student)
    for term in terms:
        sync_buffers(term, ignore=term.banks)
    if average is not None:
        sync_buffers(average)


def training_row(
    sums: Mapping[str, float], progress: Progress, *, lr: float, skipped: int, unread: int = 0
) -> dict[str, Any]:
    """The row of metrics.jsonl for an epoch's training; the evaluation adds to it.

    sums: over the epoch's images on all ranks, by name of the metric; `images` counts them.
    skipped, unread: bad steps so far; images of this epoch that could not be read.
    """
    images = sums["images"]
    row: dict[str, Any] = {"epoch": progress.epoch + 1, "lr": lr}
    for name, value in sums.items():
        if name != "images":
            row[f"train_{name}"] = value / (images or torch.nan)
    row["images_per_s"] = images / max(progress.epoch_s, 1e-9)
    # Two clocks: the time that was waited may exceed that of the steps.
    row["data_wait"] = min(progress.wait_s / max(progress.epoch_s, 1e-9), 1.0)
    row["seconds"] = progress.epoch_s
    row["skipped"] = skipped
    if unread:
        row["unread"] = unread
    for measured, name in (("train_correct", "train_accuracy"), ("train_pick_ratio", "pick_ratio")):
        if measured in row:
            row[name] = row.pop(measured)
    return row


def tell(
    on_epoch: Callable[[dict[str, Any]], object] | None,
    row: Mapping[str, Any],
    world: World,
    *,
    saved: bool,
) -> None:
    """Call the user's `on_epoch`. Its exception ends the run on every rank, after the epoch's save.

    saved: whether there was one.
    """
    if on_epoch is None:
        return
    failed: Exception | None = None
    if world.is_main:
        try:
            on_epoch(dict(row))
        except Exception as error:  # the caller's code, which may raise anything
            failed = error
    if failed is not None:
        state = "is saved: resume=True continues after it" if saved else "is not saved"
        failed.add_note(f"fastkd: raised by on_epoch after epoch {row['epoch']}, which {state}")
    others = broadcast_object(failed and repr(failed)) if world.size > 1 else None
    if failed is not None:
        raise failed
    if others:
        raise RunFailed(f"on_epoch failed on rank 0: {others}")


def keep_scores(
    scores: list[dict[str, Any]], found: Mapping[str, Any], epoch: int, *, better: bool
) -> None:
    """Keep what an evaluation of labelled pixels says of each class: the best epoch, the last one.

    A row of metrics has no place for it. better: whether this epoch is the best one so far.
    """
    if "class_iou" not in found:
        return
    classes = {str(number): iou for number, iou in enumerate(found["class_iou"])}
    row = {"epoch": epoch, "chance": found["chance"]} | classes
    scores[:] = [row if better or not scores else scores[0], row]


def summary_of(
    plan: Plan,
    progress: Progress,
    history: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Last and best headline metric, if measured, and the rates of the run; for summary.json.

    scores: of `keep_scores`; they become `class_iou_best` and `class_iou_last`, by class id.
    """
    last = history[-1]
    metric = headline(last)
    measured = {}
    if f"val_{metric}" in last:
        measured = {f"{metric}_last": last[f"val_{metric}"], f"{metric}_best": progress.best}
    for which, row in zip(("best", "last"), scores, strict=False):
        classes = {name: iou for name, iou in row.items() if name not in ("epoch", "chance")}
        measured |= {f"class_iou_{which}": classes, "chance": row["chance"]}
    return {
        "epochs": plan.epochs,
        **measured,
        "best_epoch": progress.best_epoch,
        "images_per_s": median_high(row["images_per_s"] for row in history),
        "data_wait": median_high(row["data_wait"] for row in history),
        "train_seconds": sum(row["seconds"] for row in history),
        "skipped_steps": last["skipped"],
        "unread_images": max(row.get("unread", 0) for row in history),
    }
