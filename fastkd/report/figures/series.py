"""Runs as series of a figure: which are compared, in what groups, and the points of a curve."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastkd.errors import UserError
from fastkd.evaluation.headline import HEADLINES
from fastkd.report.gains import standard_error
from fastkd.report.runs_read import ReportedRun, read_run

__all__ = [
    "Curve",
    "Spread",
    "alone_history",
    "alone_run",
    "by",
    "comparable",
    "curve",
    "draw_curve",
    "spread",
    "teacher_of",
    "with_alone_beside",
]


class Curve(NamedTuple):
    """Values of a metric by epoch."""

    epochs: list[int]
    values: list[float]

    @property
    def best(self) -> int:
        """Index of the largest value, the first of equal ones."""
        return self.values.index(max(self.values))


class Spread(NamedTuple):
    """Mean of some values and its standard error."""

    mean: float
    error: float
    """0 for a single value."""
    count: int


def comparable(runs: Sequence[ReportedRun]) -> tuple[str, str, list[ReportedRun]]:
    """The metric of the first run with a history, its printed name, and the runs judged by it."""
    measured = [run for run in runs if run.history]
    if not measured:
        return "accuracy", HEADLINES["accuracy"], []
    metric = measured[0].metric
    return metric, HEADLINES[metric], [run for run in measured if run.metric == metric]


def by(
    key: Callable[[ReportedRun], str], runs: Sequence[ReportedRun]
) -> dict[str, list[ReportedRun]]:
    """Runs by a text, in the order in which it appears first."""
    found: dict[str, list[ReportedRun]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return found


def curve(history: Sequence[Mapping[str, Any]], key: str) -> Curve | None:
    """A column of metrics.jsonl; None where no row has it."""
    points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
    if not points:
        return None
    epochs, values = zip(*points, strict=True)
    return Curve(list(epochs), list(values))


def with_alone_beside(runs: Sequence[ReportedRun]) -> list[ReportedRun]:
    """Those whose student alone is drawn beside them: one that is a run of the report is not."""
    known = {run.path.resolve() for run in runs}
    return [run for run in runs if run.alone is None or run.alone.resolve() not in known]


def alone_run(run: ReportedRun) -> ReportedRun | None:
    """The student alone that a run is measured by; None without its folder, or if it is damaged."""
    if run.alone is None:
        return None
    try:
        return read_run(run.alone)
    except UserError:
        return None


def alone_history(run: ReportedRun) -> list[dict[str, Any]]:
    """Rows of the student alone that a run is measured by; none where it has no such run."""
    if run.alone is None:
        return ((run.summary or {}).get("alone") or {}).get("history", [])
    found = alone_run(run)
    return found.history if found else []


def teacher_of(run: ReportedRun, runs: Sequence[ReportedRun]) -> dict[str, Any] | None:
    """What a run says of its teacher; None without one, or where it is a run of the report."""
    teacher = (run.summary or {}).get("teacher")
    if not teacher or teacher.get(run.metric) is None:
        return None
    digest = (teacher.get("training") or {}).get("digest")
    for other in runs:
        own = other.summary or {}
        if digest is not None and own.get("digest") == digest:
            return None
        # Taken from the folder of that run.
        reached = own.get(f"{run.metric}_best")
        same = reached is not None and abs(reached - teacher[run.metric]) < 1e-9
        if same and own.get("student", other.key("student.name")) == teacher.get("name"):
            return None
    return teacher


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    error = standard_error(values) if len(values) > 1 else 0.0
    return Spread(statistics.mean(values), error, len(values))


def draw_curve(axes: Any, found: Curve, look: Mapping[str, Any], label: str | None) -> None:
    """A line; a single epoch is a point, which no line would show."""
    axes.plot(
        found.epochs,
        found.values,
        color=look["color"],
        linestyle=look["linestyle"],
        marker=look["marker"] if len(found.epochs) == 1 else None,
        label=label,
    )
