"""How the weights of a student are spread, at the end and over the training (MEAL V2).

Drawn from `report.record=weights` of the runs, and of their own student alone, which the paper has
as the network that was trained on labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fastkd.report.colours import QUIET, look_of
from fastkd.report.figures.figure import (
    Drawn,
    FigureKind,
    integer_axis,
    legend_below,
    new_figure,
)
from fastkd.report.figures.series import alone_run, with_alone_beside
from fastkd.report.runs_read import ReportedRun

__all__ = ["KINDS"]

PLACES = ("first", "middle", "last")
_NEEDS = "report.record=weights"
_FULL = 60
"""Weights that a bin of a small layer has on average."""
_BINS = (100, 50, 25, 20, 10)
"""Numbers of bins into which those of a recording can be joined."""


@dataclass(frozen=True)
class _Series:
    """The recorded rows of one training."""

    label: str
    rows: list[dict[str, Any]]


def _series(runs: Sequence[ReportedRun]) -> list[_Series]:
    """The runs and their students alone, as far as they recorded weights."""
    found: list[_Series] = []
    beside = {run.path for run in with_alone_beside(runs)}
    for run in runs:
        alone = alone_run(run) if run.path in beside else None
        named = [(run, run.label if len(runs) > 1 else "student distilled")]
        if alone is not None:
            named.append((alone, f"{run.label}, alone" if len(runs) > 1 else "student alone"))
        for one, label in named:
            rows = one.recorded("weights")
            if isinstance(rows, list) and rows:
                found.append(_Series(label, rows))
    return found


def _joined(counts: Sequence[int]) -> np.ndarray:
    """Fewer bins, where a layer has few weights."""
    total = sum(counts)
    number = next((one for one in _BINS if total >= _FULL * one), _BINS[-1])
    if len(counts) % number:
        return np.asarray(counts)
    return np.asarray(counts).reshape(number, -1).sum(1)


def _histograms(runs: Sequence[ReportedRun]) -> Drawn | None:
    series = _series(runs)
    if not series:
        return None
    figure, axes = new_figure("page", panels=(1, len(PLACES)), ratio=0.8)
    rows: list[dict[str, Any]] = []
    shown: list[tuple[str, Mapping[str, Any], dict[str, Any]]] = []
    start = series[0].rows[0]
    if start["epoch"] == 0:
        shown.append(("before training", start, {"color": QUIET, "linestyle": ":"}))
    for index, one in enumerate(series):
        look = look_of(index)
        style = {"color": look["color"], "linestyle": look["linestyle"]}
        shown.append((one.label, one.rows[-1], style))
    for place, panel in zip(PLACES, axes[0], strict=True):
        for label, row, style in shown:
            layer = row[place]
            if not layer["counts"]:
                continue
            counts = _joined(layer["counts"])
            edges = np.linspace(layer["low"], layer["high"], len(counts) + 1)
            density = counts / counts.sum() / (edges[1] - edges[0])
            panel.stairs(density, edges, label=label, linewidth=1.3, **style)
            rows += [
                {"run": label, "epoch": row["epoch"], "layer": layer["layer"]}
                | {"from": left, "to": right, "share": count / int(counts.sum())}
                for (left, right), count in zip(
                    pairwise(edges.tolist()), counts.tolist(), strict=True
                )
            ]
        panel.set_title(f"{place} layer: {series[0].rows[-1][place]['layer']}")
        panel.set_xlabel("weight")
    axes[0, 0].set_ylabel("share of weights per unit")
    legend_below(figure, axes[0, 0], columns=3)
    return Drawn(figure, rows)


def _percentiles(runs: Sequence[ReportedRun]) -> Drawn | None:
    series = _series(runs)
    if not series:
        return None
    figure, axes = new_figure("page", panels=(1, len(PLACES)), ratio=0.8)
    rows: list[dict[str, Any]] = []
    for place, panel in zip(PLACES, axes[0], strict=True):
        for index, one in enumerate(series):
            look = look_of(index)
            epochs = [row["epoch"] for row in one.rows]
            for number, percent in enumerate(one.rows[0][place]["percentiles"]):
                values = [row[place]["percentiles"].get(percent) for row in one.rows]
                panel.plot(
                    epochs,
                    values,
                    color=look["color"],
                    linestyle=look["linestyle"],
                    label=None if number else one.label,
                )
                if index == 0 and values[-1] is not None:
                    panel.annotate(
                        f"{percent}%",
                        (epochs[-1], values[-1]),
                        xytext=(3, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=6.5,
                        annotation_clip=False,
                    )
                rows += [
                    {"run": one.label, "epoch": epoch, "layer": one.rows[-1][place]["layer"]}
                    | {"percent": int(percent), "weight": value}
                    for epoch, value in zip(epochs, values, strict=True)
                ]
        panel.set_title(f"{place} layer: {series[0].rows[-1][place]['layer']}")
        panel.set_xlabel("epoch")
        integer_axis(panel.xaxis)
    axes[0, 0].set_ylabel("weight")
    legend_below(figure, axes[0, 0], columns=3)
    return Drawn(figure, rows)


KINDS = (
    FigureKind(
        name="weight_histograms",
        title="Weights of the first, a middle and the last layer",
        source="MEAL V2, figure 7",
        draw=_histograms,
        needs=_NEEDS,
    ),
    FigureKind(
        name="weight_percentiles",
        title="Percentiles of the weights over the training",
        source="MEAL V2, figure 8",
        draw=_percentiles,
        needs=_NEEDS,
    ),
)
