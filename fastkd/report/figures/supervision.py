"""Curves of runs that differ in one thing: in their labels, their start, or the discriminator."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.report.figures.figure import (
    Drawn,
    FigureKind,
    integer_axis,
    legend_below,
    look_of,
    new_figure,
    percent_axis,
)
from fastkd.report.figures.series import (
    alone_history,
    curve,
    draw_curve,
    with_alone_beside,
)
from fastkd.report.runs_read import ReportedRun

__all__ = ["KINDS", "initialisation_of", "supervision_of"]

_History = Sequence[Mapping[str, Any]]
_HARD = "hard labels"


def supervision_of(run: ReportedRun) -> str:
    """What the targets of a run are: `hard labels`, `soft labels` of a teacher, or both."""
    losses = run.key("losses", {})
    if not run.key("teacher"):
        return _HARD
    labelled = any(
        (one.get("weight", 1) if name == "ce" else one.get("ce_weight", 0)) or 0
        for name, one in losses.items()
        if isinstance(one, Mapping)
    )
    return "hard and soft labels" if labelled else "soft labels"


def initialisation_of(run: ReportedRun) -> str:
    """Where the student's weights come from: a file, a tag of timm or torchvision, or a draw."""
    if weights := run.key("student.weights"):
        return Path(str(weights)).name
    if run.key("student.pretrained"):
        name = str(run.key("student.name"))
        return name.partition(".")[2] or f"{name}, pretrained"
    return "random"


def _supervision(runs: Sequence[ReportedRun]) -> Drawn | None:
    """A run with its own student alone has both by itself."""
    series = [(supervision_of(run), run, run.history) for run in runs]
    series += [
        (_HARD, run, rows) for run in with_alone_beside(runs) if (rows := alone_history(run))
    ]
    panels = {
        "val_accuracy": "top-1 accuracy",
        "val_top5": "top-5 accuracy",
        "val_miou": "mIoU",
        "val_map": "mAP",
    }
    return _curves(series, panels)


def _initialisations(runs: Sequence[ReportedRun]) -> Drawn | None:
    panels = {
        "train_accuracy": "accuracy in training",
        "val_accuracy": "validation accuracy",
        "val_miou": "validation mIoU",
        "val_map": "validation mAP",
    }
    return _curves([(initialisation_of(run), run, run.history) for run in runs], panels)


def _discriminator(runs: Sequence[ReportedRun]) -> Drawn | None:
    """Only among students that have a teacher."""
    taught = [run for run in runs if run.key("teacher")]

    def which(run: ReportedRun) -> str:
        return "with discriminator" if "discriminator" in _losses(run) else "without"

    panels = {
        "val_accuracy": "top-1 accuracy",
        "train_discriminator": "loss of the discriminator",
    }
    return _curves([(which(run), run, run.history) for run in taught], panels)


def _subject(run: ReportedRun) -> str:
    """Data and network, whatever its weights: curves of one subject are comparable."""
    keys = ("width", "block", "blocks", "depth", "shortcuts", "stem")
    # Behind the point are timm's weights.
    network = str(run.key("student.name")).partition(".")[0]
    return repr([run.key("data.name"), network, *(run.key(f"student.{key}") for key in keys)])


def _losses(run: ReportedRun) -> Mapping[str, Any]:
    found = run.key("losses", {})
    return found if isinstance(found, Mapping) else {}


def _curves(
    series: Sequence[tuple[str, ReportedRun, _History]], panels: Mapping[str, str]
) -> Drawn | None:
    """A panel for each key that some run has.

    Of the first subject that has series of two names; None without one.
    """
    by_subject: dict[str, list[tuple[str, ReportedRun, _History]]] = {}
    for one in series:
        if one[2]:
            by_subject.setdefault(_subject(one[1]), []).append(one)
    several = (own for own in by_subject.values() if len({name for name, _, _ in own}) > 1)
    series = next(several, [])
    panels = {
        key: title
        for key, title in panels.items()
        if any(curve(rows, key) for _, _, rows in series)
    }
    if not panels:
        return None
    names = list(dict.fromkeys(name for name, _, _ in series))
    figure, grid = new_figure("page" if len(panels) > 1 else "column", panels=(1, len(panels)))
    found_rows: list[dict[str, Any]] = []
    for axes, (key, title) in zip(grid[0], panels.items(), strict=True):
        labelled = set[str]()
        for name, run, history in series:
            if (found := curve(history, key)) is None:
                continue
            look = look_of(names.index(name))
            draw_curve(axes, found, look, None if name in labelled else name)
            labelled.add(name)
            found_rows += [
                {"series": name, "run": run.label, "metric": key, "epoch": epoch, "value": value}
                for epoch, value in zip(found.epochs, found.values, strict=True)
            ]
        axes.set(xlabel="epoch", ylabel=title)
        integer_axis(axes.xaxis)
        if "loss" not in title:
            percent_axis(axes.yaxis)
    legend_below(figure, grid, columns=3)
    return Drawn(figure, found_rows)


KINDS = (
    FigureKind(
        name="hard_soft",
        title="Hard against soft labels",
        source="MEAL V2, figure 3",
        draw=_supervision,
        needs="a run with its student alone (baseline.lrs), or runs with and without a teacher",
    ),
    FigureKind(
        name="initialisation",
        title="Curves by initialisation",
        source="MEAL V2, figure 6",
        draw=_initialisations,
        needs="runs that differ in student.weights or student.pretrained, such as a random start "
        "and two sets of weights",
    ),
    FigureKind(
        name="discriminator",
        title="With and without the discriminator",
        source="MEAL V2, figure 9",
        draw=_discriminator,
        needs="a run with losses.discriminator and one of the same student without",
    ),
)
