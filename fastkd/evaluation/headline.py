"""What a run is judged by: one headline metric per kind of data, with its printed name.

The evaluation decides which one applies; trainer, report and screen only look it up here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["HEADLINES", "headline", "headline_of", "of_epoch"]

HEADLINES = {"accuracy": "accuracy", "map": "mAP", "miou": "mIoU"}
"""Key of an evaluation, and with `_last` and `_best` of a summary -> how it is printed. All are
shares of 1, larger is better."""


def headline(found: Mapping[str, Any]) -> str:
    """The key of HEADLINES in an evaluation, a row of metrics or a summary.

    `accuracy` if there is none: a run that failed, a network that was only counted.
    """
    forms = ("{}", "val_{}", "{}_last", "{}_best")
    return next(
        (name for name in HEADLINES if any(form.format(name) in found for form in forms)),
        "accuracy",
    )


def headline_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """Headline metric of a table: the first row's that is not `accuracy`, else `accuracy`."""
    return next((found for row in rows if (found := headline(row)) != "accuracy"), "accuracy")


def of_epoch(found: Mapping[str, float]) -> dict[str, float]:
    """The values of an evaluation that enter a row of metrics.jsonl, as `val_NAME`."""
    aside = ("samples", "chance", "class_iou")
    return {f"val_{name}": value for name, value in found.items() if name not in aside}
