"""Figures over epochs: how accuracy rises within runs, and what a longer run brings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.config.values import dotted
from fastkd.report.colours import QUIET, look_of
from fastkd.report.figures.figure import (
    Drawn,
    FigureKind,
    integer_axis,
    legend_below,
    new_figure,
    percent_axis,
)
from fastkd.report.figures.series import (
    alone_history,
    by,
    comparable,
    curve,
    draw_curve,
    spread,
    teacher_of,
    with_alone_beside,
)
from fastkd.report.labels import differences, labels
from fastkd.report.runs_read import ReportedRun

__all__ = ["KINDS", "method_names"]

_MOST_LEVELS = 3
"""Teachers beyond these would be a bundle of lines."""


def _accuracy(runs: Sequence[ReportedRun]) -> Drawn | None:
    metric, printed, runs = comparable(runs)
    key = f"val_{metric}"
    figure, axes = new_figure("column", ratio=0.7)
    axes, rows = axes[0, 0], list[dict[str, Any]]()
    series = [(run.group, run, run.history) for run in runs]
    series += [
        (f"{run.group}, student alone", run, alone_history(run)) for run in with_alone_beside(runs)
    ]
    looks: dict[str, int] = {}
    for name, run, history in series:
        found = curve(history, key)
        if found is None:
            continue
        first = name not in looks
        look = look_of(looks.setdefault(name, len(looks)))
        draw_curve(axes, found, look, name if first else None)
        mark: dict[str, Any] = {
            "marker": look["marker"],
            "color": look["color"],
            "linestyle": "none",
        }
        axes.plot(found.epochs[-1:], found.values[-1:], **mark)
        best = found.best
        axes.plot(
            found.epochs[best], found.values[best], **mark, markerfacecolor="none", markersize=7
        )
        rows.append(
            {
                "series": name,
                "run": run.label,
                "epochs": found.epochs[-1],
                f"{metric}_last": found.values[-1],
                f"{metric}_best": found.values[best],
                "best_epoch": found.epochs[best],
                "finished": run.finished,
            }
        )
    if not rows:
        return None
    levels = {
        (teacher.get("name", "teacher"), teacher[metric])
        for run in runs
        if (teacher := teacher_of(run, runs))
    }
    for name, level in sorted(levels)[:_MOST_LEVELS]:
        axes.axhline(level, color=QUIET, linewidth=0.8, linestyle=(0, (1, 1)))
        axes.annotate(
            f"teacher {name}",
            (0.01, level),
            xycoords=("axes fraction", "data"),
            fontsize=6,
            color=QUIET,
            ha="left",
            va="bottom",
        )
    axes.set(xlabel="epoch", ylabel=f"validation {printed}")
    integer_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    legend_below(figure, axes, title="large open mark: best epoch, small one: last")
    return Drawn(figure, rows)


def _budget(runs: Sequence[ReportedRun]) -> Drawn | None:
    metric, printed, runs = comparable([run for run in runs if run.finished])
    named = method_names(runs)
    figure, axes = new_figure("column", ratio=0.7)
    axes, rows = axes[0, 0], list[dict[str, Any]]()
    index = 0
    for name, members in by(lambda run: named[run.path], runs).items():
        points = []
        for text, equal in by(lambda run: f"{_epochs(run):08d}", members).items():
            values = [1 - last for run in equal if (last := run.last_and_best()[0]) is not None]
            if values:
                points.append((int(text), spread(values)))
        if len(points) < 2:
            continue
        points.sort()
        look = look_of(index)
        index += 1
        axes.errorbar(
            [epochs for epochs, _ in points],
            [one.mean for _, one in points],
            yerr=[one.error for _, one in points],
            label=name,
            capsize=2,
            **look,
        )
        rows += [
            {
                "method": name,
                "epochs": epochs,
                f"{metric}_error": one.mean,
                "standard_error": one.error,
                "runs": one.count,
            }
            for epochs, one in points
        ]
    if not rows:
        return None
    axes.set(xlabel="epochs of the whole run", ylabel=_of_error(printed))
    axes.set_xscale("log", base=2)
    _plain_ticks(axes, sorted({row["epochs"] for row in rows}))
    percent_axis(axes.yaxis)
    legend_below(figure, axes)
    return Drawn(figure, rows)


def method_names(runs: Sequence[ReportedRun]) -> dict[Path, str]:
    """Runs by what they are trained with, whatever their seed, epochs and schedule: losses, views,
    networks, data."""
    chosen = {run.path: _method(run) for run in runs}
    told = differences(chosen) if chosen else {}
    # Those that agree are one method, and not told apart by their folders.
    told = {
        path: tuple(key for key in choice if not key.startswith("run="))
        for path, choice in told.items()
    }
    named = labels(list(dict.fromkeys(told.values())))
    return {path: named[choice] or "these runs" for path, choice in told.items()}


def _method(run: ReportedRun) -> dict[str, Any]:
    losses = run.key("losses", {})
    keys: dict[str, Any] = {"losses": "+".join(losses)}
    for section in ("student", "augment", "data"):
        found = run.key(section, {})
        if isinstance(found, Mapping):
            keys |= {f"{section}.{name}": value for name, value in dotted(found).items()}
    keys["teacher.name"] = run.key("teacher.name")
    keys |= {f"losses.{name}": value for name, value in dotted(losses).items()}
    kept = ("data.root", "data.workers", "data.backend", "data.seed", "data.download")
    return {name: value for name, value in keys.items() if name not in kept}


def _epochs(run: ReportedRun) -> int:
    return int((run.summary or {}).get("epochs") or len(run.history))


def _of_error(printed: str) -> str:
    return "validation error" if printed == "accuracy" else f"1 - validation {printed}"


def _plain_ticks(axes: Any, values: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(FixedLocator([float(value) for value in values]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))


KINDS = (
    FigureKind(
        name="accuracy_epochs",
        title="Validation accuracy by epoch",
        source="",
        draw=_accuracy,
        needs="a run with at least one epoch",
    ),
    FigureKind(
        name="error_budget",
        title="Error against the number of epochs",
        source="KD x DA, figures 1 and 3",
        draw=_budget,
        needs="finished runs of one method with different epochs: --sweep 'epochs=60;120;240'",
    ),
)
