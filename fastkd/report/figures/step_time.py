"""Where the time of a training step goes, part by part.

Drawn from `report.record=time`. The parts are timed one after the other, with the device waited for
in between; in all other steps they overlap, so their sum is more than the time of a step.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from fastkd.report.colours import look_of
from fastkd.report.figures.figure import Drawn, FigureKind, legend_below, new_figure
from fastkd.report.runs_read import ReportedRun

__all__ = ["KINDS"]

_UNIT = "_ms"
_HATCHES = ("", "////", "", "....", "", "\\\\\\\\", "", "xxxx")
"""Keep neighbours apart in greyscale."""


def _medians(run: ReportedRun) -> dict[str, float]:
    """Milliseconds per step of each part, the median over the epochs.

    Without the first, in which compilers and caches start, where there are others.
    """
    rows = run.recorded("time")
    if not isinstance(rows, list):
        return {}
    steady = rows[1:] or rows
    parts = dict.fromkeys(key for row in steady for key in row if key.endswith(_UNIT))
    found = {part: [row[part] for row in steady if row.get(part) is not None] for part in parts}
    return {
        part.removesuffix(_UNIT): statistics.median(values)
        for part, values in found.items()
        if values
    }


def _draw(runs: Sequence[ReportedRun]) -> Drawn | None:
    shown = {run.label: parts for run in runs if (parts := _medians(run))}
    if not shown:
        return None
    from fastkd.training.recording.step_clock import PARTS

    # In the order of a step, also where one run has a part that another lacks.
    names = [part for part in PARTS if any(part in parts for parts in shown.values())]
    figure, axes = new_figure("page", ratio=0.09 + 0.06 * len(shown))
    panel = axes[0, 0]
    rows: list[dict[str, Any]] = []
    ends = dict.fromkeys(shown, 0.0)
    for index, part in enumerate(names):
        widths = [shown[run].get(part, 0.0) for run in shown]
        panel.barh(
            list(shown),
            widths,
            left=list(ends.values()),
            height=0.6,
            label=part,
            color=look_of(index)["color"],
            hatch=_HATCHES[index % len(_HATCHES)],
            edgecolor="white",
            linewidth=0.6,
        )
        for run, width in zip(shown, widths, strict=True):
            ends[run] += width
    for run, parts in shown.items():
        total = sum(parts.values())
        panel.annotate(
            f"{total:.3g} ms",
            (ends[run], run),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
        rows += [
            {"run": run, "part": part, "ms_per_step": value, "share": value / total if total else 0}
            for part, value in parts.items()
        ]
    panel.margins(x=0.12)
    panel.set_xlim(left=0)
    panel.invert_yaxis()
    panel.grid(visible=False, axis="y")
    panel.set_xlabel("ms per step, parts one after the other")
    legend_below(figure, panel, columns=len(names))
    return Drawn(figure, rows)


KINDS = (
    FigureKind(
        name="step_time",
        title="Where the time of a step goes",
        source="",
        draw=_draw,
        needs="report.record=time",
    ),
)
