"""What a network costs against what it reaches, with the networks that no other one beats."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastkd.report.colours import QUIET, look_of
from fastkd.report.figures.figure import Drawn, FigureKind, legend_below, new_figure, percent_axis
from fastkd.report.figures.series import Spread, by, comparable, spread, teacher_of
from fastkd.report.runs_read import ReportedRun

__all__ = ["KINDS", "front_of"]

LATENCY = "latency.json"
"""In a run folder: `fastkd latency RUN --json RUN/latency.json`."""


@dataclass(frozen=True)
class _Network:
    """A point: a group of runs, or the teacher or the student alone of one."""

    name: str
    reached: Spread
    costs: dict[str, float]
    """By the title of the axis."""


def front_of(costs: Sequence[float], reached: Sequence[float]) -> list[int]:
    """Indices of the Pareto front by rising cost: no other is as cheap and reaches more, or is
    cheaper and reaches as much."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda one: (costs[one], -reached[one])):
        if not front or reached[index] > reached[front[-1]]:
            front.append(index)
    return front


def _pareto(runs: Sequence[ReportedRun]) -> Drawn | None:
    metric, printed, runs = comparable([run for run in runs if run.finished])
    titles, timed = _titles(runs)
    found = _networks(runs, metric, timed)
    titles = [title for title in titles if sum(title in one.costs for one in found) > 1]
    if not titles:
        return None
    figure, grid = new_figure("page", ratio=0.85, panels=(1, len(titles)))
    rows: list[dict[str, Any]] = [
        {
            "network": one.name,
            f"{metric}_last": one.reached.mean,
            "standard_error": one.reached.error,
            "runs": one.reached.count,
        }
        for one in found
    ]
    for axes, title in zip(grid[0], titles, strict=True):
        those = [number for number, one in enumerate(found) if title in one.costs]
        costs = [found[number].costs[title] for number in those]
        reached = [found[number].reached.mean for number in those]
        front = front_of(costs, reached)
        axes.plot(
            [costs[one] for one in front],
            [reached[one] for one in front],
            color=QUIET,
            linewidth=0.9,
            zorder=1,
            label="Pareto front",
        )
        for place, number in enumerate(those):
            look = look_of(number)
            axes.errorbar(
                costs[place],
                reached[place],
                yerr=found[number].reached.error or None,
                color=look["color"],
                marker=look["marker"],
                linestyle="none",
                markersize=5,
                capsize=2,
                label=found[number].name,
            )
            rows[number] |= {title: costs[place], f"front by {title}": place in front}
        # Within a decade the ticks of a logarithm are crowded.
        wide = max(costs) > 10 * min(costs)
        axes.set(xscale="log" if wide else "linear", xlabel=title)
        _plain(axes.xaxis, times=title.startswith("ms"))
        percent_axis(axes.yaxis)
    grid[0, 0].set_ylabel(f"validation {printed}")
    legend_below(figure, grid, columns=4)
    return Drawn(figure, rows)


def _plain(axis: Any, *, times: bool) -> None:
    """Ticks as 10 k and 1 M, as the table has them; of times as numbers."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}") if times else EngFormatter())
    axis.set_minor_formatter(NullFormatter())


def _titles(runs: Sequence[ReportedRun]) -> tuple[list[str], dict[str, float]]:
    """The axes; and milliseconds by path of a run, by `fastkd latency` or else in training."""
    measured = {str(run.path): _latencies(run) for run in runs}
    measured = {path: found for path, found in measured.items() if found}
    kinds = [kind for found in measured.values() for kind in found]
    titles = ["parameters", "MACs an image"]
    if kinds:
        kind = max(dict.fromkeys(kinds), key=kinds.count)
        times = {path: found[kind] for path, found in measured.items() if kind in found}
        return [*titles, f"ms a call ({kind})"], times
    rates = {str(run.path): (run.summary or {}).get("images_per_s") for run in runs}
    times = {path: 1000 / rate for path, rate in rates.items() if rate}
    return [*titles, "ms an image in training"], times


def _latencies(run: ReportedRun) -> dict[str, float]:
    """Median milliseconds by what was measured; none without a readable latency.json."""
    try:
        found = json.loads((run.path / LATENCY).read_text(encoding="utf-8"))
        return {
            f"{row['on']}, batch {row['input'][0]}, threads {row['threads']}": float(row["p50_ms"])
            for row in found["rows"]
        }
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _networks(runs: Sequence[ReportedRun], metric: str, timed: dict[str, float]) -> list[_Network]:
    titles, _ = _titles(runs)
    found: list[_Network] = []
    for name, members in by(lambda run: run.group, runs).items():
        own = [run.summary or {} for run in members]
        times = [timed[str(run.path)] for run in members if str(run.path) in timed]
        found += _network(name, own, f"{metric}_last", times, titles)
        by_training = titles[-1] == "ms an image in training"
        alone = [one["alone"] for one in own if one.get("alone")]
        # Of the same network, so a measured call takes as long.
        times = _training_times(alone) if by_training else times
        found += _network(f"{name}, alone", alone, f"{metric}_last", times, titles)
    teachers: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if teacher := teacher_of(run, runs):
            teachers.setdefault(f"teacher {teacher.get('name', '')}".rstrip(), []).append(teacher)
    for name, facts in teachers.items():
        # One teacher of many runs is one network.
        distinct = list({one[metric]: one for one in facts}.values())
        found += _network(name, distinct, metric, [], titles)
    return found


def _training_times(facts: Iterable[dict[str, Any]]) -> list[float]:
    return [1000 / one["images_per_s"] for one in facts if one.get("images_per_s")]


def _network(
    name: str,
    facts: Sequence[dict[str, Any]],
    key: str,
    times: Sequence[float],
    titles: Sequence[str],
) -> list[_Network]:
    values = [one[key] for one in facts if one.get(key) is not None]
    if not values:
        return []
    parameters, macs, time = titles
    costs = {parameters: facts[0].get("params"), macs: facts[0].get("macs")}
    costs[time] = spread(times).mean if times else None
    return [_Network(name, spread(values), {k: float(v) for k, v in costs.items() if v})]


KINDS = (
    FigureKind(
        name="pareto",
        title="Accuracy against parameters, MACs and time",
        source="Moonshine, figure 2",
        draw=_pareto,
        needs="a finished run with a teacher, or two networks; times of inference are taken from "
        f"RUN/{LATENCY} (fastkd latency RUN --json RUN/{LATENCY}), else those of training",
    ),
)
