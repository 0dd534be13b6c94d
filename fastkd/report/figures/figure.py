"""What every figure of `fastkd report` is: a drawing with its numbers, in the fonts of the house.

Flow: `fastkd.report.figures` lists the kinds; `FigureKind.of` draws one of a list of runs; `save`
writes the picture, and its numbers as CSV and LaTeX. matplotlib is imported inside functions, and
draws without a screen and without touching the caller's settings.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastkd.errors import UserError
from fastkd.output.run_folder import csv_text
from fastkd.output.table import latex_rows
from fastkd.printable import few
from fastkd.report.colours import INK, Look, look_of
from fastkd.report.runs_read import ReportedRun
from fastkd.storage.atomic import atomic_path

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

__all__ = [
    "FORMATS",
    "WIDTHS",
    "Drawn",
    "FigureKind",
    "Look",
    "Width",
    "check_formats",
    "house",
    "integer_axis",
    "legend_below",
    "log_axis",
    "look_of",
    "new_figure",
    "percent_axis",
    "save",
]

FORMATS = ("png", "pdf", "svg", "csv", "tex")
"""What `save` can write: pictures, and the numbers as CSV and as a LaTeX table."""

Width = Literal["column", "page"]
WIDTHS: Mapping[Width, float] = {"column": 3.4, "page": 7.0}
"""Inches of one column and of both in a two-column paper."""

_DPI = 300


@dataclass(frozen=True)
class Drawn:
    """A figure and the numbers in it."""

    figure: "Figure"
    rows: list[dict[str, Any]]
    """For CSV and LaTeX; names of columns carry units, shares are shares of 1."""


@dataclass(frozen=True)
class FigureKind:
    """One kind of figure, and where it comes from."""

    name: str
    """Stem of its files, such as `class_gain`."""
    title: str
    source: str
    """`MEAL V2, figure 2`; empty if no paper prints such a figure."""
    draw: Callable[[Sequence[ReportedRun]], Drawn | None]
    """None: these runs have not what it needs. Called by `of`."""
    needs: str
    """One sentence on what a run must have: `report.record=weights`, `two runs with ..`."""

    def of(self, runs: Sequence[ReportedRun]) -> Drawn | None:
        """The figure of these runs in the house's fonts; None: they have not what it needs."""
        with house():
            return self.draw(runs)


@contextmanager
def house() -> Generator[None]:
    """Fonts, lines and colours of a figure at its printed size; the caller's settings come back."""
    from matplotlib import rc_context

    with rc_context(
        {
            "font.size": 8,
            "axes.titlesize": 8,
            "axes.labelsize": 8,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "legend.fontsize": 7,
            "figure.titlesize": 9,
            "lines.linewidth": 1.3,
            "lines.markersize": 4,
            "axes.linewidth": 0.7,
            "xtick.major.width": 0.7,
            "ytick.major.width": 0.7,
            "grid.linewidth": 0.5,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "text.color": INK,
            # Names of runs and classes may have dollar signs.
            "text.parse_math": False,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            # The same numbers make the same file.
            "svg.hashsalt": "fastkd",
            "pdf.fonttype": 42,
        }
    ):
        yield


def new_figure(
    width: Width = "column", *, ratio: float = 0.72, panels: tuple[int, int] = (1, 1)
) -> "tuple[Figure, np.ndarray]":
    """A figure of a printed width, and its axes as an object array [rows, columns].

    ratio: height of one panel by its width. panels: rows and columns.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with house():
        rows, columns = panels
        inches = WIDTHS[width]
        size = (inches, inches / columns * ratio * rows)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
        for one in axes.flat:
            one.grid(True)
    return figure, axes


def percent_axis(axis: Any) -> None:
    """Ticks of shares of 1 in percent. axis: `axes.yaxis`."""
    from matplotlib.ticker import FuncFormatter

    # Without zeros behind the point, which PercentFormatter writes.
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g}%"))


def integer_axis(axis: Any) -> None:
    """Ticks at whole numbers only, such as epochs. axis: `axes.xaxis`."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def log_axis(panel: Any) -> None:
    """A logarithmic y axis with plain numbers, after the curves are drawn.

    Few labels, but at least one: less than half a decade is shown as a linear axis.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = panel.get_yaxis().get_data_interval()
    decades = math.log10(high / low) if 0 < low < high < math.inf else 0.0
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    if decades < 0.5:
        panel.yaxis.set_major_formatter(plain)
        return
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(plain)
    if decades < 1.5:
        panel.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        panel.yaxis.set_minor_formatter(plain)
    else:
        panel.yaxis.set_minor_formatter(NullFormatter())


def legend_below(figure: "Figure", axes: Any, *, columns: int = 2, title: str = "") -> None:
    """One legend under the whole figure, where it covers no curve.

    axes: one panel, or an array of them, which share their series; the one with the most is shown.
    Long names get one column. The figure grows by the lines of the legend.
    """
    every = [one.get_legend_handles_labels() for one in getattr(axes, "flat", [axes])]
    handles, labels = max(every, key=lambda one: len(one[1]))
    if not labels:
        return
    widest = max(map(len, labels))
    columns = max(1, min(columns, len(labels), int(figure.get_figwidth() / (0.058 * widest + 0.5))))
    lines = -(-len(labels) // columns) + bool(title)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.135 * lines + 0.1)
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=columns,
        title=title or None,
        alignment="left",
    )


def check_formats(formats: Sequence[str]) -> None:
    """UserError for a format that `save` does not know."""
    wrong = [name for name in formats if name not in FORMATS]
    if wrong:
        raise UserError(f"there is no format {few(wrong)}: choose of {', '.join(FORMATS)}")


def save(drawn: Drawn, path: Path, formats: Sequence[str]) -> list[Path]:
    """Write a figure and its numbers; returns the files.

    path: without a suffix; its folder must exist. formats: of FORMATS. A figure without rows has
    no CSV and no LaTeX file. The same figure makes the same bytes.

    Raises:
        UserError: an unknown format.
        RunFailed: a file cannot be written.
    """
    check_formats(formats)
    written: list[Path] = []
    for kind in formats:
        if kind in ("csv", "tex") and not drawn.rows:
            continue
        target = path.with_name(f"{path.name}.{kind}")
        with atomic_path(target) as beside:
            if kind == "csv":
                beside.write_text(csv_text(drawn.rows), encoding="utf-8")
            elif kind == "tex":
                beside.write_text(latex_rows(drawn.rows), encoding="utf-8")
            else:
                # Without the time of day, or equal figures would be unequal files.
                undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
                with house():
                    drawn.figure.savefig(beside, format=kind, dpi=_DPI, metadata=undated)
        written.append(target)
    return written
