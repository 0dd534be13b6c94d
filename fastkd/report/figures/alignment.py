"""A student without shortcuts beside its teacher (AlignKD), and weights of losses that change.

The charts of AlignKD's appendix are validation accuracies of JointRD and AlignKD over the epochs.
Beside them, from `report.record=alignment`, is what AlignKD makes small: the squared distance of
every stage from the teacher's. `eta_schedule` needs nothing but the recipe.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastkd.errors import UserError
from fastkd.evaluation.headline import HEADLINES
from fastkd.report.colours import look_of
from fastkd.report.figures.figure import (
    Drawn,
    FigureKind,
    integer_axis,
    legend_below,
    log_axis,
    new_figure,
    percent_axis,
)
from fastkd.report.runs_read import ReportedRun

__all__ = ["KINDS"]

_OF_PLAIN = ("stage_mse", "jointrd")
"""The losses of AlignKD and of JointRD."""


def _recorded(run: ReportedRun) -> list[dict[str, Any]]:
    rows = run.recorded("alignment")
    return rows if isinstance(rows, list) else []


def _line(index: int, points: int) -> dict[str, Any]:
    look = look_of(index)
    marker = look["marker"] if points == 1 else None
    return {"color": look["color"], "linestyle": look["linestyle"], "marker": marker}


def _alignment(runs: Sequence[ReportedRun]) -> Drawn | None:
    if not any(_recorded(run) for run in runs):
        runs = [run for run in runs if any(run.key(f"losses.{name}") for name in _OF_PLAIN)]
    if not runs:
        return None
    recorded = {run.label: _recorded(run) for run in runs}
    stages = list(dict.fromkeys(s for rows in recorded.values() for r in rows for s in r["mse"]))
    panels = 1 + len(stages)
    # Four panels are two by two, not three and one.
    columns = 2 if panels == 4 else min(panels, 3)
    size = (-(-panels // columns), columns)
    figure, axes = new_figure(
        "page" if panels > 1 else "column", panels=size, ratio=0.55 if columns == 2 else 0.8
    )
    first, *others = axes.flat
    rows = [row for index, run in enumerate(runs) for row in _accuracy(first, index, run)]
    first.set_ylabel(f"validation {HEADLINES[runs[0].metric]}")
    percent_axis(first.yaxis)
    for stage, panel in zip(stages, others, strict=False):
        for index, run in enumerate(runs):
            values = [(row["epoch"], row) for row in recorded[run.label] if stage in row["mse"]]
            if not values:
                continue
            epochs = [epoch for epoch, _ in values]
            relative = [row["relative"][stage] for _, row in values]
            panel.plot(epochs, relative, **_line(index, len(epochs)))
            rows += [
                {"run": run.label, "epoch": epoch, "stage": stage}
                | {"mse": row["mse"][stage], "relative": row["relative"][stage]}
                for epoch, row in values
            ]
        panel.set(title=stage, ylabel="distance² / teacher²")
        log_axis(panel)
    for panel in others[len(stages) :]:
        panel.set_axis_off()
    for panel in axes.flat[:panels]:
        panel.set_xlabel("epoch")
        integer_axis(panel.xaxis)
    legend_below(figure, first, columns=2)
    return Drawn(figure, rows)


def _accuracy(panel: Any, index: int, run: ReportedRun) -> list[dict[str, Any]]:
    key = f"val_{run.metric}"
    points = [(row["epoch"], row[key]) for row in run.history if row.get(key) is not None]
    if points:
        epochs, values = zip(*points, strict=True)
        panel.plot(epochs, values, label=run.label, **_line(index, len(points)))
    return [{"run": run.label, "epoch": epoch, run.metric: value} for epoch, value in points]


def _schedules(run: ReportedRun) -> dict[str, Callable[[float], float]]:
    """The losses' weights that change, by `loss.name`: functions of the recipe's epoch."""
    from fastkd.losses.base.registry import build_terms, typed_config

    losses = run.recipe.get("losses")
    found: dict[str, Callable[[float], float]] = {}
    if run.of_distill or not isinstance(losses, Mapping):
        return found
    for name, keys in losses.items():
        try:
            (term,) = build_terms({name: typed_config(name, keys)})
        except (UserError, ValueError, TypeError):
            continue  # of another version of fastkd, or registered by a program of the user
        found |= {f"{name}.{one}": value for one, value in term.schedules().items()}
    return found


def _eta(runs: Sequence[ReportedRun]) -> Drawn | None:
    shown = [(run, name, of) for run in runs for name, of in _schedules(run).items()]
    if not shown:
        return None
    figure, axes = new_figure("column")
    panel = axes[0, 0]
    rows: list[dict[str, Any]] = []
    curves: dict[tuple[float, ...], str] = {}
    for run, name, value_at in shown:
        factor = run.key("epoch_factor", 1.0)
        epochs = max(1, round(run.key("epochs", 1) * factor))
        values = tuple(value_at(epoch / factor) for epoch in range(epochs))
        rows += [
            {"run": run.label, "weight": name, "epoch": epoch, "value": value}
            for epoch, value in enumerate(values, start=1)
        ]
        # Equal curves would hide each other.
        label = f"{name}, {run.label}" if len(runs) > 1 else name
        curves[values] = f"{curves[values]}; {label}" if values in curves else label
    for index, (values, label) in enumerate(curves.items()):
        epochs = range(1, len(values) + 1)
        panel.plot(epochs, values, label=label, **_line(index, len(values)))
    panel.set(xlabel="epoch", ylabel="factor of the loss")
    panel.set_ylim(bottom=0)
    integer_axis(panel.xaxis)
    legend_below(figure, panel, columns=2)
    return Drawn(figure, rows)


KINDS = (
    FigureKind(
        name="alignment",
        title="Accuracy, and the stages' distance from the teacher's",
        source="AlignKD, appendix A (accuracy)",
        draw=_alignment,
        needs="losses.stage_mse or losses.jointrd; report.record=alignment for the distances",
    ),
    FigureKind(
        name="eta_schedule",
        title="Weights of losses that change over the training",
        source="AlignKD, section 5 (eta)",
        draw=_eta,
        needs="a loss with a schedule, such as losses.stage_mse",
    ),
)
