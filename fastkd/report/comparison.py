"""The end of a run: teacher, student alone, distilled student and the paper's number compared.

`fastkd.runs.stages` passes the summaries of its stages; they become summary.json, curves.png and
the last table on the screen.
"""

import time
from collections.abc import Sequence
from typing import Any

from fastkd.output.console import Console
from fastkd.output.run_folder import RunFolder
from fastkd.report import plots
from fastkd.report.paper import PaperRow

__all__ = ["finish_report"]


def finish_report(
    summary: dict[str, Any],
    folder: RunFolder,
    console: Console,
    *,
    teachers: Sequence[str] = (),
    block: str | None = None,
    paper: PaperRow | None = None,
) -> None:
    """Write summary.json and curves.png, print the table; `summary` gains the paper's number.

    teachers: labels of the teachers. block: the student's cheap block.
    """
    teacher, alone = summary["teacher"], summary["alone"]
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[dict[str, Any]]] = {}
    facts = teacher.get("members", [teacher]) if teacher else []
    for label, one in zip(teachers, facts, strict=True):
        lesson = one.get("training")
        rows.append({"run": f"teacher {label}", "note": "", **(lesson or {}), **one})
        if lesson:
            curves[rows[-1]["run"]] = lesson["history"]
    if teacher and "members" in teacher:
        rows.append({"run": "teachers together", "note": "", **teacher})
    if alone:
        tried = len(summary["alone_tried"])
        rows.append(
            {"run": "student alone", **alone, "note": f"lr {alone['lr']:g}, best of {tried}"}
        )
        curves["student alone"] = alone["history"]
    kind = "student distilled" if teacher else "student"
    run = f"{kind} {block}" if block else kind
    rows.append({"run": run, **summary, "note": f"lr {summary['lr']:g}"})
    curves[kind] = summary["history"]
    if paper:
        summary["paper"] = paper.facts
        rows += [paper.row] if paper.row else []
    drawn = plots.draw_curves(folder.path / "curves.png", curves)
    folder.finish(summary | {"finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    console.comparison(rows)
    if paper:
        console.note(paper.text)
    console.note(drawn)
