"""Runs side by side as a table: for the terminal, for a pipe, as Markdown and as LaTeX.

Flow: `report` and `runs.sweep` make rows; `cells_of` is the one place that turns them into text,
and each format lays the same text out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from fastkd.evaluation.headline import HEADLINES, headline_of
from fastkd.printable import printable

__all__ = [
    "DISPENSABLE",
    "NOTE_WIDTH",
    "as_columns",
    "as_html",
    "as_latex",
    "as_markdown",
    "comparison_table",
    "latex_rows",
]

DISPENSABLE = ("images_per_s", "best", "macs", "params", "of_teacher", "note")
"""Columns that a terminal may be too narrow for, the first to go first."""
NOTE_WIDTH = 10
"""What a folded note needs, with its distance."""
_LONGEST_NAME = 48
"""Longer names of runs are folded."""

CELL = 400
"""Longest cell, in characters."""


@dataclass(frozen=True)
class _Cells:
    """A table as text."""

    headers: dict[str, str]
    """Title of each column by its key, in two lines where it says so."""
    rows: list[dict[str, str]]

    def without(self, dropped: Sequence[str]) -> "_Cells":
        return _Cells({k: v for k, v in self.headers.items() if k not in dropped}, self.rows)


def cells_of(rows: Sequence[Mapping[str, Any]]) -> _Cells:
    """The text of all columns that some row fills; run and accuracy are always there.

    Each row may have `run`, `accuracy_last` (or `accuracy`, for a network that was only
    evaluated), `accuracy_best`, `of_teacher` (accuracy of the run's teacher), `gain` and `gain_se`
    (over the same student alone, and its standard error), `params`, `macs`, `images_per_s` (in
    training) and `note`. Accuracies are shares of 1. `map` or `miou` replaces `accuracy` if a row
    has it.
    """
    metric = headline_of(rows)
    printed = HEADLINES[metric]
    headers = {
        "run": "\nrun",
        "last": f"{printed}\nlast",
        "best": "\nbest",
        "gain": "gain over\nalone",
        "of_teacher": f"teacher\n{printed}",
        "params": "\nparams",
        "macs": "\nMACs",
        "images_per_s": "images\nper s",
        "note": "\nnote",
    }
    found = [
        {
            "run": printable(str(row.get("run", "")), CELL),
            "last": _percent(row.get(f"{metric}_last", row.get(metric))),
            "best": _percent(row.get(f"{metric}_best")),
            "gain": _points(row.get("gain"), row.get("gain_se")),
            "of_teacher": _percent(row.get("of_teacher")),
            "params": _quantity(row.get("params")),
            # Of a network that cannot be counted it is None.
            "macs": _quantity(row.get("macs"), "-" if "macs" in row else ""),
            "images_per_s": ""
            if row.get("images_per_s") is None
            else f"{row['images_per_s']:,.0f}",
            "note": printable(str(row.get("note") or ""), CELL),
        }
        for row in rows
    ]
    optional = ("gain", "of_teacher")
    empty = [key for key in optional if not any(row[key] for row in found)]
    return _Cells(headers, found).without(empty)


def comparison_table(rows: Sequence[Mapping[str, Any]], *, dropped: Sequence[str] = ()) -> Table:
    """For the terminal; rows as of `cells_of`, without the columns `dropped`."""
    cells = cells_of(rows).without(dropped)
    longest = max((len(row["run"]) for row in cells.rows), default=0)
    columns = {
        "run": Column("\nrun", no_wrap=longest <= _LONGEST_NAME, overflow="fold", min_width=17),
        "note": Column("\nnote", overflow="fold", style="dim", min_width=NOTE_WIDTH - 2),
    }
    table = Table(
        *(columns.get(key, _number_column(title)) for key, title in cells.headers.items()),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    for row in cells.rows:
        # As Text: a swept value such as [red] is not markup.
        table.add_row(*(Text(row[key]) for key in cells.headers))
    return table


def as_columns(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells, without columns in which no row has anything; rows as of `cells_of`."""
    cells = _filled(cells_of(rows))
    titles = [_title(title) for title in cells.headers.values()]
    return titles, [[row[key] for key in cells.headers] for row in cells.rows]


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of GitHub's Markdown."""
    cells = _filled(cells_of(rows))
    lines = [_title(title) for title in cells.headers.values()]
    rule = [":--" if key in ("run", "note") else "--:" for key in cells.headers]
    body = [[row[key].replace("|", "\\|") for key in cells.headers] for row in cells.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines, rule, *body]) + "\n"


def as_latex(rows: Sequence[Mapping[str, Any]]) -> str:
    r"""A tabular for LaTeX, to be used with `\usepackage{booktabs}`."""
    cells = _filled(cells_of(rows))
    layout = "".join("l" if key in ("run", "note") else "r" for key in cells.headers)
    lines = [[_title(title) for title in cells.headers.values()]]
    return _tabular(layout, [*lines, *([row[key] for key in cells.headers] for row in cells.rows)])


def as_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table element; whatever a run is called is text in it."""
    cells = _filled(cells_of(rows))
    left = ("run", "note")

    def line(tag: str, texts: Mapping[str, str]) -> str:
        inside = "".join(
            f"<{tag}{'' if key in left else ' class=number'}>{escape(texts[key])}</{tag}>"
            for key in cells.headers
        )
        return f"<tr>{inside}</tr>"

    head = line("th", {key: _title(title) for key, title in cells.headers.items()})
    body = "\n".join(line("td", row) for row in cells.rows)
    return f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"


def latex_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same of any rows: their keys are the titles; numbers are short and stand right."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    numbers = {key: all(_is_number(row.get(key)) for row in rows) for key in keys}
    layout = "".join("r" if numbers[key] else "l" for key in keys)
    titles = [key.replace("_", " ") for key in keys]
    return _tabular(layout, [titles, *([_cell(row.get(key)) for key in keys] for row in rows)])


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else printable(str(value), CELL)


def _tabular(layout: str, lines: Sequence[Sequence[str]]) -> str:
    head, *body = (" & ".join(map(_latex, line)) + r" \\" for line in lines)
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{layout}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text).replace("+- ", r"$\pm$ ")


def _filled(cells: _Cells) -> _Cells:
    """Without columns in which no row has anything."""
    return cells.without([key for key in cells.headers if not any(row[key] for row in cells.rows)])


def _title(header: str) -> str:
    return " ".join(header.split())


def _number_column(header: str) -> Column:
    return Column(header, justify="right", vertical="top", no_wrap=True)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _points(share: float | None, error: float | None) -> str:
    if share is None:
        return ""
    return f"{100 * share:+.2f}" + ("" if error is None else f" +- {100 * error:.2f}")


def _whole(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}"


def _quantity(number: float | None, unknown: str = "") -> str:
    if number is None:
        return unknown
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
