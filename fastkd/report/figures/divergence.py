"""How much harder than the rest the picked images are, over the training (KD x augmentation).

r of equation 4: the mean KL of teacher and student on the picked images by that on all of the pool.
A run with a pick has it in every row of metrics.jsonl; `report.record=kl` has both means, and of a
run without a pick the r of the harder half.
"""

from collections.abc import Sequence
from typing import Any

from fastkd.report.colours import look_of
from fastkd.report.figures.figure import (
    Drawn,
    FigureKind,
    legend_below,
    log_axis,
    new_figure,
    percent_axis,
)
from fastkd.report.runs_read import ReportedRun

__all__ = ["KINDS"]


def _ratios(run: ReportedRun) -> list[tuple[int, float]]:
    """(epoch, r): over the whole epoch where the run picks by KL, else as recorded."""
    if run.key("augment.pick.criterion", "kl") == "kl":
        picked = [(row["epoch"], row["pick_ratio"]) for row in run.history if "pick_ratio" in row]
        if picked:
            return [(epoch, ratio) for epoch, ratio in picked if ratio is not None]
    return [(row["epoch"], row["ratio"]) for row in _recorded(run) if row["ratio"] is not None]


def _recorded(run: ReportedRun) -> list[dict[str, Any]]:
    rows = run.recorded("kl")
    return rows if isinstance(rows, list) else []


def _epochs(run: ReportedRun) -> int:
    """Of the whole run; of an unfinished one those so far."""
    return (run.summary or {}).get("epochs") or max(
        (row["epoch"] for row in run.history), default=1
    )


def _draw(runs: Sequence[ReportedRun]) -> Drawn | None:
    shown = [(run, ratios) for run in runs if (ratios := _ratios(run))]
    if not shown:
        return None
    both = any(_recorded(run) for run, _ in shown)
    figure, axes = new_figure("page" if both else "column", panels=(1, 1 + both))
    rows: list[dict[str, Any]] = []
    for index, (run, ratios) in enumerate(shown):
        total = _epochs(run)
        look = look_of(index)
        marker = look["marker"] if len(ratios) == 1 else None
        line = {"color": look["color"], "linestyle": look["linestyle"], "marker": marker}
        done = [epoch / total for epoch, _ in ratios]
        axes[0, 0].plot(done, [ratio for _, ratio in ratios], label=run.label, **line)
        means = {row["epoch"]: row for row in _recorded(run)}
        if means:
            done = [epoch / total for epoch in means]
            means_of = {key: [row[key] for row in means.values()] for key in _MEANS}
            axes[0, 1].plot(done, means_of["kl_all"], label=run.label, **line)
            axes[0, 1].plot(done, means_of["kl_hardest"], alpha=0.55, **line)
        for epoch, ratio in ratios:
            row = {"run": run.label, "epoch": epoch, "done": epoch / total, "ratio": ratio}
            rows.append(row | {key: means.get(epoch, {}).get(key) for key in _MEANS if both})
    axes[0, 0].set_ylabel("mean KL: harder part / all")
    if both:
        axes[0, 1].set_ylabel("mean KL in nats (pale: harder part)")
        log_axis(axes[0, 1])
    for panel in axes[0]:
        panel.set_xlabel("training done")
        percent_axis(panel.xaxis)
    legend_below(figure, axes[0, 0], columns=2)
    return Drawn(figure, rows)


_MEANS = ("kl_all", "kl_hardest")

KINDS = (
    FigureKind(
        name="kl_ratio",
        title="Mean KL of the picked images by that of all",
        source="KD x DA, figure 4",
        draw=_draw,
        needs="augment.pick.criterion=kl, or report.record=kl",
    ),
)
