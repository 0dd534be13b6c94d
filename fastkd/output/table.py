"""Runs side by side as a table for the terminal; `console` prints it after a run or a sweep."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from fastkd.evaluation.headline import HEADLINES, headline_of
from fastkd.printable import printable

__all__ = ["comparison_table"]

CELL = 400
"""Longest cell, in characters."""


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Runs side by side: accuracy (or mAP), size, cost and speed.

    Each row may have `run`, `accuracy_last` (or `accuracy`, for a network that was only
    evaluated), `accuracy_best`, `params`, `macs`, `images_per_s` (in training) and `note`;
    missing values stay empty. Accuracies are shares of 1. Fits into 80 columns. `map` replaces
    `accuracy` if a row has it. `of_teacher`, the accuracy of the run's teacher, adds a column.
    """
    metric = headline_of(rows)
    columns = {
        "run": Column("\nrun", overflow="fold", min_width=17),
        "last": _number_column(f"{HEADLINES[metric]}\nlast"),
        "best": _number_column("\nbest"),
        "of_teacher": _number_column(f"teacher\n{HEADLINES[metric]}"),
        "params": _number_column("\nparams"),
        "macs": _number_column("\nMACs"),
        "images_per_s": _number_column("images\nper s"),
        "note": Column("\nnote", overflow="fold", style="dim"),
    }
    if not any(row.get("of_teacher") is not None for row in rows):
        del columns["of_teacher"]
    table = Table(
        *columns.values(),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    for row in rows:
        speed = row.get("images_per_s")
        cells = {
            "run": str(row.get("run", "")),
            "last": _percent(row.get(f"{metric}_last", row.get(metric))),
            "best": _percent(row.get(f"{metric}_best")),
            "of_teacher": _percent(row.get("of_teacher")),
            "params": _quantity(row.get("params")),
            # Of a network that cannot be counted it is None.
            "macs": _quantity(row.get("macs"), "-" if "macs" in row else ""),
            "images_per_s": "" if speed is None else f"{speed:,.0f}",
            "note": str(row.get("note", "")),
        }
        # As Text: a swept value such as [red] is no markup.
        table.add_row(*(Text(printable(cells[name], CELL)) for name in columns))
    return table


def _number_column(header: str) -> Column:
    return Column(header, justify="right", vertical="top", no_wrap=True)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _quantity(number: float | None, unknown: str = "") -> str:
    if number is None:
        return unknown
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
