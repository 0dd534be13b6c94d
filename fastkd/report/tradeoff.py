"""Accuracy against cost of several networks as a PNG: the picture of `fastkd compress`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastkd.errors import RunFailed
from fastkd.printable import in_words
from fastkd.report.colours import colours_of
from fastkd.report.figures.cost import front_of
from fastkd.storage.atomic import atomic_path

__all__ = ["Point", "draw_tradeoff"]

# Of the safe palette those that show on white, with marks that differ without colour.
_COLOURS = (7, 0, 6, 2, 4, 3)
_LONGEST_BAR = 1.25
"""How far beyond the dearest network a bar is shown; a longer one is cut."""
_MARKS = ("s", "o", "^", "v", "D", "P")


@dataclass(frozen=True)
class Point:
    """One network."""

    name: str
    cost: float
    accuracy: float
    """Share of 1; the mean where there are several seeds."""
    spread: float = 0.0
    """Standard deviation over the seeds."""
    cost_from: float | None = None
    cost_to: float | None = None


def draw_tradeoff(
    path: Path, points: Sequence[Point], *, cost: str, limit: float | None = None, title: str = ""
) -> str:
    """Draw it, and say where it is, or why there is none: no result fails for its picture.

    cost: title of its axis. limit: of the cost, as a line.
    """
    try:
        _draw(path, points, cost, limit, title)
    except Exception as error:  # matplotlib also fails on fonts and on caches of its own
        return f"no picture: {error if isinstance(error, RunFailed) else in_words(error)}"
    return f"picture {path}"


def _draw(path: Path, points: Sequence[Point], cost: str, limit: float | None, title: str) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    palette = colours_of(8)
    with rc_context({"font.size": 10, "axes.titlesize": 11, "figure.dpi": 100}):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        front = [
            points[index]
            for index in front_of([p.cost for p in points], [p.accuracy for p in points])
        ]
        axes.plot([p.cost for p in front], [p.accuracy for p in front], color="0.6", lw=1, zorder=1)
        for number, point in enumerate(points):
            low, high = point.cost_from or point.cost, point.cost_to or point.cost
            axes.errorbar(
                point.cost,
                point.accuracy,
                xerr=[[max(0.0, point.cost - low)], [max(0.0, high - point.cost)]],
                yerr=point.spread or None,
                label=point.name,
                color=tuple(part / 255 for part in palette[_COLOURS[number % len(_COLOURS)]]),
                marker=_MARKS[number % len(_MARKS)],
                markersize=8,
                linestyle="none",
                capsize=3,
                zorder=2,
            )
        if limit is not None:
            axes.axvline(limit, color="0.35", linestyle="--", linewidth=1.2, label="target")
        axes.set(xlabel=cost, ylabel="accuracy", title=title)
        axes.set_xlim(0, _right_end(points, limit))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="best")
        with atomic_path(path) as beside:
            figure.savefig(beside, format="png", dpi=150)


def _right_end(points: Sequence[Point], limit: float | None) -> float:
    """Of the cost axis; one long bar of a disturbed measurement does not stretch it."""
    most = max([*(point.cost for point in points), limit or 0.0])
    longest = max(point.cost_to or point.cost for point in points)
    return 1.05 * max(most, min(longest, _LONGEST_BAR * most))
