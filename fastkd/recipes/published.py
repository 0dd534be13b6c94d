"""The numbers that the papers print, cell by cell, from published.json next to this file.

The JSON holds the tables under the papers' own labels, null if a cell is empty or unreadable; the
modules of the papers make a recipe from every cell. Nothing here is a result of fastkd.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["METRICS", "Published", "cells", "papers"]

METRICS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "top1_error": "top-1 error",
    "top5_error": "top-5 error",
    "class_iou": "mean class IoU",
    "map": "mAP",
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """One printed number and its place."""

    paper: str
    """Key of the paper in published.json."""
    table: str
    row: str
    column: str
    metric: str
    """A key of METRICS."""
    value: float
    """In percent."""
    std: float | None = None
    """Standard deviation over the paper's runs, in points."""
    epoch: str | None = None
    """Whether the value is from the `last` epoch or the `best`; None if the paper does not say."""

    @property
    def place(self) -> str:
        """`Table 3`, `section 6.3`."""
        return f"Table {self.table}" if self.table[0].isdigit() else self.table

    def __str__(self) -> str:
        spread = "" if self.std is None else f" +- {self.std:.2f}"
        return f"{METRICS[self.metric]} {self.value:.2f}{spread}"


@cache
def papers() -> dict[str, Any]:
    """published.json: per paper its title and tables."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def cells(paper: str) -> Iterator[Published]:
    """Every number of a paper's tables, in reading order."""
    source = papers()[paper]
    for name, table in source["tables"].items():
        metrics = table["metric"]
        if isinstance(metrics, str):
            metrics = [metrics] * len(table["columns"])
        for row, values in table["rows"].items():
            for column, metric, value in zip(table["columns"], metrics, values, strict=True):
                if value is None:
                    continue
                number, std = value if isinstance(value, list) else (value, None)
                yield Published(
                    paper=paper,
                    table=name,
                    row=row,
                    column=column,
                    metric=metric,
                    value=number,
                    std=std,
                    epoch=table.get("epoch", source.get("epoch")),
                )
