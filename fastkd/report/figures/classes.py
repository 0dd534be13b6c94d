"""Figures by class: what distillation brings each of them, and which ones it tells apart."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastkd.printable import printable
from fastkd.report.answers import NETWORKS, Answers, answers_of
from fastkd.report.colours import QUIET, look_of
from fastkd.report.figures.figure import Drawn, FigureKind, legend_below, new_figure, percent_axis
from fastkd.report.figures.series import by, spread
from fastkd.report.runs_read import ReportedRun

__all__ = ["KINDS"]

_MOST_CLASSES = 20
_MOST_PAIRS = 12
_LONGEST = 22
_NEEDS = (
    "a finished run whose images have one class each, with a student alone or a teacher, and the "
    "networks' answers, for which its data are read (--predict)"
)


class _Compared(NamedTuple):
    """The runs of one group, each with what it is measured by."""

    group: str
    reference: str
    """A value of NETWORKS."""
    pairs: list[tuple[Answers, Answers]]
    """The reference's answers and the student's."""


def _compared(runs: Sequence[ReportedRun]) -> list[_Compared]:
    """Students against themselves alone, or where no run has that, against their teachers."""
    for reference in ("alone", "teacher"):
        found: list[_Compared] = []
        for group, members in by(lambda run: run.group, runs).items():
            answers = [answers_of(run) for run in members]
            pairs = [
                (one[reference], one["student"])
                for one in answers
                if reference in one and "student" in one
            ]
            pairs = [pair for pair in pairs if pair[0].classes == pair[1].classes]
            if pairs:
                found.append(_Compared(group, NETWORKS[reference], pairs))
        if found:
            # Of other classes there would be no common axis.
            classes = found[0].pairs[0][0].classes
            return [one for one in found if one.pairs[0][0].classes == classes]
    return []


def _accuracy_C(answers: Answers) -> np.ndarray:
    """By class, a share of 1; NaN for a class without images."""
    counts_CC = answers.confusion()
    with np.errstate(invalid="ignore"):
        return np.diag(counts_CC) / counts_CC.sum(1)


def _class_gain(runs: Sequence[ReportedRun]) -> Drawn | None:
    compared = _compared(runs)
    if not compared:
        return None
    classes = compared[0].pairs[0][0].classes
    gains = [_by_class(one) for one in compared]
    strength_C = np.nan_to_num(gains[0][2], nan=-np.inf)
    order = np.argsort(-strength_C, kind="stable")
    order = order[np.isfinite(strength_C[order])]
    shown = order
    if len(order) > _MOST_CLASSES:
        half = _MOST_CLASSES // 2
        shown = np.concatenate([order[:half], order[-half:]])
    figure, grid = new_figure("page", ratio=0.045 * len(shown) + 0.25, panels=(1, 2))
    left, right = grid[0]
    places = np.arange(len(shown))[::-1]
    before_C, after_C, _, _ = gains[0]
    left.hlines(places, before_C[shown], after_C[shown], color=QUIET, linewidth=0.8)
    for values_C, index, label in (
        (before_C, 1, compared[0].reference),
        (after_C, 0, "student"),
    ):
        look = look_of(index)
        left.plot(
            values_C[shown],
            places,
            linestyle="none",
            marker=look["marker"],
            color=look["color"],
            label=label,
        )
    rows: list[dict[str, Any]] = []
    right.axvline(0, color=QUIET, linewidth=0.8)
    for number, (one, (before_C, after_C, gain_C, error_C)) in enumerate(
        zip(compared, gains, strict=True)
    ):
        look = look_of(number)
        shift = 0.0 if len(compared) == 1 else 0.4 * (number / (len(compared) - 1) - 0.5)
        right.errorbar(
            100 * gain_C[shown],
            places - shift,
            xerr=100 * error_C[shown],
            linestyle="none",
            marker=look["marker"],
            color=look["color"],
            capsize=1.5,
            label=one.group,
        )
        rows += [
            {
                "run": one.group,
                "class": classes[number_of_class],
                f"{one.reference} accuracy": float(before_C[number_of_class]),
                "student accuracy": float(after_C[number_of_class]),
                "gain": float(gain_C[number_of_class]),
                "standard_error": float(error_C[number_of_class]),
                "runs": len(one.pairs),
            }
            for number_of_class in order
        ]
    left.set_yticks(places, [printable(classes[number], _LONGEST) for number in shown])
    right.set_yticks(places, [])
    left.set_xlabel(f"accuracy of {compared[0].group}")
    right.set_xlabel(f"gain over the {compared[0].reference}, points")
    percent_axis(left.xaxis)
    right.tick_params(axis="y", length=0)
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    if len(shown) < len(order):
        right.set_title(f"{len(shown)} of {len(order)} classes, the largest changes")
    if len(compared) > 1:
        legend_below(figure, right)
    return Drawn(figure, rows)


def _by_class(one: _Compared) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Accuracy of the reference and of the student, gain, its standard error; means over seeds."""
    before_RC = np.stack([_accuracy_C(before) for before, _ in one.pairs])
    after_RC = np.stack([_accuracy_C(after) for _, after in one.pairs])
    gain_RC = after_RC - before_RC
    error_C = np.zeros(gain_RC.shape[1])
    if len(gain_RC) > 1:
        error_C = gain_RC.std(0, ddof=1) / np.sqrt(len(gain_RC))
    return before_RC.mean(0), after_RC.mean(0), gain_RC.mean(0), error_C


def _confusion(runs: Sequence[ReportedRun]) -> Drawn | None:
    compared = _compared(runs)
    if not compared:
        return None
    one = compared[0]
    classes = one.pairs[0][0].classes
    before_RCC = np.stack([_rates(before) for before, _ in one.pairs])
    after_RCC = np.stack([_rates(after) for _, after in one.pairs])
    change_CC = (after_RCC - before_RCC).mean(0)
    # A right answer is no confusion.
    np.fill_diagonal(change_CC, 0)
    flat = np.argsort(-np.abs(change_CC), axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = [
        (int(label), int(said))
        for label, said in zip(*np.unravel_index(flat, change_CC.shape), strict=True)
        if change_CC[label, said] != 0
    ]
    if not pairs:
        return None
    pairs.sort(key=lambda pair: change_CC[pair])
    figure, grid = new_figure("column", ratio=0.075 * len(pairs) + 0.2)
    axes = grid[0, 0]
    places = range(len(pairs), 0, -1)
    rows: list[dict[str, Any]] = []
    for place, (label, said) in zip(places, pairs, strict=True):
        before = spread(before_RCC[:, label, said].tolist())
        after = spread(after_RCC[:, label, said].tolist())
        axes.annotate(
            "",
            xy=(after.mean, place),
            xytext=(before.mean, place),
            arrowprops={"arrowstyle": "->", "color": QUIET, "linewidth": 0.9},
        )
        rows.append(
            {
                "run": one.group,
                "label": classes[label],
                "taken for": classes[said],
                f"{one.reference} share": before.mean,
                "student share": after.mean,
                "change": after.mean - before.mean,
                "runs": after.count,
            }
        )
    for index, column, name in (
        (1, f"{one.reference} share", one.reference),
        (0, "student share", "student"),
    ):
        look = look_of(index)
        axes.plot(
            [row[column] for row in rows],
            list(places),
            linestyle="none",
            marker=look["marker"],
            color=look["color"],
            label=name,
        )
    axes.set_yticks(
        list(places),
        [f"{printable(r['label'], 12)} as {printable(r['taken for'], 12)}" for r in rows],
    )
    axes.set_xlabel("share of the images of a class")
    percent_axis(axes.xaxis)
    legend_below(figure, axes, title=one.group)
    return Drawn(figure, rows)


def _rates(answers: Answers) -> np.ndarray:
    """[C, C] share of the images of each class by prediction; 0 for a class without images."""
    counts_CC = answers.confusion()
    return counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)


KINDS = (
    FigureKind(
        name="class_gain",
        title="Accuracy by class, and what distillation adds",
        source="MEAL V2, figure 2",
        draw=_class_gain,
        needs=_NEEDS,
    ),
    FigureKind(
        name="confusion_pairs",
        title="Confusions that distillation changed most",
        source="",
        draw=_confusion,
        needs=_NEEDS,
    ),
)
