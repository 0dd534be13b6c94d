"""The end of a run: teacher, student alone, distilled student and the paper's number compared.

`fastkd.runs.stages` passes the summaries of its stages; they become summary.json, curves.png and
the last table on the screen.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastkd.evaluation.chance import Chance
from fastkd.evaluation.headline import headline
from fastkd.output.console import Console
from fastkd.output.run_folder import RunFolder
from fastkd.report import plots
from fastkd.report.class_iou import class_lines
from fastkd.report.paper import PaperRow

__all__ = ["failure", "finish_report", "verdict"]

DIVERGED = 10
"""A validation loss of this many times that of chance is not overconfidence any more."""


def finish_report(
    summary: dict[str, Any],
    folder: RunFolder,
    console: Console,
    *,
    teachers: Sequence[str] = (),
    block: str | None = None,
    paper: PaperRow | None = None,
    chance: Chance | None = None,
) -> None:
    """Write summary.json and curves.png, print the table; `summary` gains the paper's number.

    teachers: labels of the teachers. block: the student's cheap block. chance: what a student must
    exceed; None where that is not known.
    """
    teacher, alone = summary["teacher"], summary["alone"]
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[dict[str, Any]]] = {}
    levels: dict[str, float] = {}
    facts = teacher.get("members", [teacher]) if teacher else []
    for label, one in zip(teachers, facts, strict=True):
        lesson = one.get("training")
        rows.append({"run": f"teacher {label}", "note": "", **(lesson or {}), **one})
        if lesson:
            curves[rows[-1]["run"]] = lesson["history"]
        elif (reached := one.get(headline(one))) is not None:
            levels[rows[-1]["run"]] = reached
    if teacher and "members" in teacher:
        rows.append({"run": "teachers together", "note": "", **teacher})
    if alone:
        tried = len(summary["alone_tried"])
        note = _judged(alone, chance, f"lr {alone['lr']:g}, best of {tried}")
        rows.append({"run": "student alone", **alone, "note": note})
        curves["student alone"] = alone["history"]
    kind = "student distilled" if teacher else "student"
    run = f"{kind} {block}" if block else kind
    rows.append({"run": run, **summary, "note": _judged(summary, chance, f"lr {summary['lr']:g}")})
    curves[kind] = summary["history"]
    if paper:
        summary["paper"] = paper.facts
        rows += [paper.row] if paper.row else []
    drawn = plots.draw_curves(
        folder.path / "curves.png",
        curves,
        title=f"{summary.get('recipe', '')}  ({folder.path.name})".lstrip(),
        teachers=levels,
    )
    finished = {"finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    folder.finish(summary | finished, rows)
    console.comparison(rows)
    for line in class_lines(summary):
        console.note(line)
    if chance:
        students = {"student alone": alone, kind: summary}
        for label, one in students.items():
            if one and (found := failure(label, one, chance)):
                console.note(found)
    if paper:
        console.note(paper.text)
    console.note(drawn)


def _judged(summary: dict[str, Any], chance: Chance | None, note: str) -> str:
    """The row's note with the verdict, which the summary keeps for the table of a sweep."""
    found = verdict(summary, chance) if chance else ""
    if found:
        summary["verdict"] = found
    return "; ".join(filter(None, [found, note]))


def verdict(summary: Mapping[str, Any], chance: Chance) -> str:
    """`diverged` or `at chance` for a student that has learned nothing; empty for any other."""
    loss = summary["history"][-1].get("val_loss")
    if loss is not None and not loss <= DIVERGED * chance.loss:
        return "diverged"
    return "" if chance.beaten_by(summary[f"{headline(summary)}_last"]) else "at chance"


def failure(label: str, summary: Mapping[str, Any], chance: Chance) -> str:
    """One sentence on a student that has learned nothing, with advice; empty for any other."""
    lower, loss = f"optim.lr={summary['lr'] / 10:g}", summary["history"][-1].get("val_loss")
    found = verdict(summary, chance)
    if found == "diverged":
        return (
            f"{label}: diverged, the validation loss is {loss:.4g} and that of guessing "
            f"{chance.loss:.4g}. Lower the learning rate, such as {lower}"
        )
    if not found:
        return ""
    metric = headline(summary)
    blind = "always naming the commonest class gives"
    if metric == "miou":
        blind = "an answer that ignores the image gives"
    return (
        f"{label}: at chance, {summary[f'{metric}_last']:.2%} where {blind} "
        f"{chance.accuracy:.2%}. Give it more epochs or another learning rate, such as {lower}"
    )
