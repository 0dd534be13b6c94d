"""Intersection over union of every class: under its name in summary.json, and as a table.

Flow: the trainer keeps the numbers by class id (`training.epoch_end.keep_scores`), `runs.stages`
and `fastkd.api` name them, `report.comparison` shows them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastkd.evaluation.confusion import by_class
from fastkd.printable import printable

__all__ = ["class_lines", "with_class_names"]

KEYS = ("class_iou_best", "class_iou_last")
"""In a summary: of the epoch whose weights are kept, and of the last one."""
_MOST, _WIDEST = 60, 32


def with_class_names(
    summary: Mapping[str, Any], classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """The summary with its scores by class name; unchanged where pixels are not labelled.

    classes: names by class id; None: the ids are the names.
    """
    named = {key: by_class(list(summary[key].values()), classes) for key in KEYS if key in summary}
    return {**summary, **named}


def class_lines(summary: Mapping[str, Any]) -> list[str]:
    """A table as lines: a row per class, a column per network; none where pixels have no labels.

    summary: of a run with its `teacher` and the student `alone`, each of which may be None. Of
    trained students the scores are those of the weights that are kept, the best epoch's.
    """
    alone, teacher = summary.get("alone") or {}, summary.get("teacher") or {}
    found: dict[str, Mapping[str, float | None] | None] = {
        "alone": alone.get("class_iou_best"),
        "teachers" if "members" in teacher else "teacher": teacher.get("class_iou"),
        "distilled" if teacher else "student": summary.get("class_iou_best"),
    }
    columns = {title: scores for title, scores in found.items() if scores}
    if not columns:
        return []
    every = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    if len(every) > _MOST:
        return [f"IoU of {len(every)} classes: in summary.json, class_iou_best"]
    names = {name: printable(name, _WIDEST) for name in every}
    first = max(len("IoU by class"), *map(len, names.values()))
    widths = {title: max(len(title), 7) for title in columns}
    head = "  ".join(f"{title:>{widths[title]}}" for title in columns)
    lines = [f"{'IoU by class':<{first}}  {head}"]
    for name in every:
        cells = "  ".join(
            f"{_percent(scores.get(name)):>{widths[title]}}" for title, scores in columns.items()
        )
        lines.append(f"{names[name]:<{first}}  {cells}")
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
