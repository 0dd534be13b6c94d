"""Whether networks are as often right as they say: student, student alone and teacher."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastkd.report.answers import NETWORKS, Answers, answers_of
from fastkd.report.colours import QUIET, look_of
from fastkd.report.figures.figure import Drawn, FigureKind, legend_below, new_figure, percent_axis
from fastkd.report.figures.series import by
from fastkd.report.runs_read import ReportedRun

__all__ = ["BINS", "KINDS", "Calibration", "calibration"]

BINS = 15
"""Of equal width, as in Guo et al. 2017."""


class Calibration(NamedTuple):
    """Answers by their confidence, the probability of the most probable class."""

    share_B: np.ndarray
    """Of all answers, by bin; sums to 1."""
    confidence_B: np.ndarray
    """Mean of a bin; NaN for an empty one."""
    accuracy_B: np.ndarray
    """Share of a bin that is right; NaN for an empty one."""

    @property
    def error(self) -> float:
        """Expected calibration error: mean |accuracy - confidence| over all answers."""
        return float(np.nansum(self.share_B * np.abs(self.accuracy_B - self.confidence_B)))


def calibration(answers: Sequence[Answers]) -> Calibration:
    """Of the answers of one or several networks together. Guo et al. 2017, arXiv:1706.04599."""
    confidence_N = np.concatenate([one.probability_NK[:, 0] for one in answers]).astype(np.float64)
    right_N = np.concatenate([one.predicted_N == one.labels_N for one in answers])
    # Bins are open below and closed above.
    bin_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    count_B = np.bincount(bin_N, minlength=BINS)
    with np.errstate(invalid="ignore"):
        return Calibration(
            count_B / len(bin_N),
            np.bincount(bin_N, confidence_N, BINS) / count_B,
            np.bincount(bin_N, right_N, BINS) / count_B,
        )


def _reliability(runs: Sequence[ReportedRun]) -> Drawn | None:
    for group, members in by(lambda run: run.group, runs).items():
        every = [answers_of(run) for run in members]
        found = {
            name: [one[name] for one in every if name in one]
            for name in NETWORKS
            if any(name in one for one in every)
        }
        if "student" in found:
            return _drawn(group, found)
    return None


def _drawn(group: str, found: dict[str, list[Answers]]) -> Drawn:
    figure, grid = new_figure("column", ratio=0.42, panels=(2, 1))
    above, below = grid[:, 0]
    above.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8, linestyle=(0, (1, 1)))
    rows: list[dict[str, Any]] = []
    for index, (name, answers) in enumerate(found.items()):
        measured, look = calibration(answers), look_of(index)
        filled = measured.share_B > 0
        above.plot(
            measured.confidence_B[filled],
            measured.accuracy_B[filled],
            label=f"{NETWORKS[name]}, ECE {measured.error:.1%}",
            **look,
        )
        edges = np.linspace(0, 1, BINS + 1)
        below.stairs(
            measured.share_B, edges, color=look["color"], linestyle=look["linestyle"], linewidth=1.2
        )
        rows += [
            {
                "run": group,
                "network": NETWORKS[name],
                "confidence from": float(edges[number]),
                "to": float(edges[number + 1]),
                "share": float(measured.share_B[number]),
                "confidence": _or_none(measured.confidence_B[number]),
                "accuracy": _or_none(measured.accuracy_B[number]),
                "calibration error": measured.error,
                "runs": len(answers),
            }
            for number in range(BINS)
        ]
    above.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    below.set(xlabel="confidence", ylabel="share of images", xlim=(0, 1))
    above.tick_params(labelbottom=False)
    for axis in (above.yaxis, below.yaxis, below.xaxis):
        percent_axis(axis)
    legend_below(figure, above, columns=1, title=group)
    return Drawn(figure, rows)


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


KINDS = (
    FigureKind(
        name="reliability",
        title="Reliability and calibration error",
        source="Guo et al. 2017, figure 4",
        draw=_reliability,
        needs="a finished run whose images have one class each, and its networks' answers, for "
        "which its data are read (--predict)",
    ),
)
