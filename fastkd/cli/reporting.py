"""`fastkd report`: figures, tables and a page of finished and unfinished runs; the leaderboard."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastkd.errors import UserError
from fastkd.output.console import Console
from fastkd.report.collecting import collect
from fastkd.report.figures.figure import FORMATS, check_formats
from fastkd.report.leaderboard import write_leaderboard
from fastkd.report.runs_read import ReportedRun, read_runs
from fastkd.report.writing import chosen, lines_of_figures, write_report

__all__ = ["report"]

OUT = "report"
"""Folder of a report by default."""
DOCS = "docs"
"""Folder of the leaderboard by default."""


def report(options: argparse.Namespace) -> None:
    """List the figures, write the leaderboard, or report on runs."""
    kinds = chosen(_listed(options.figures))
    if options.list:
        _refuse(options, "--list")
        for line in lines_of_figures(kinds):
            print(line)
        return
    formats = _listed(options.formats) or list(FORMATS)
    check_formats(formats)
    keys = [word for word in options.words if "=" in word]
    paths = [word for word in options.words if "=" not in word]
    if wrong := [key for key in keys if not key.startswith(("data.", "device=", "precision="))]:
        raise UserError(
            f"a report takes keys of the data, such as data.root=DIR, not {wrong[0]}: its runs are "
            f"trained"
        )
    if keys and not options.predict:
        raise UserError(f"{keys[0]} says where the images are, which only --predict reads")
    with Console() as console:
        if options.leaderboard:
            for file in write_leaderboard(paths, Path(options.out or DOCS), say=console.note):
                console.note(f"leaderboard {file}")
            return
        if not paths:
            raise UserError("name the folders of runs: fastkd report runs/RECIPE/* --out report")
        out = Path(options.out or OUT)
        collected = collect(read_runs(paths))
        asked = any(kind.name == "tsne" for kind in kinds)
        runs = _with_answers(collected.runs, out, keys, options.predict, console, last_layers=asked)
        collected = collected.of(runs)
        console.comparison(collected.rows)
        for line in collected.verdicts:
            console.note(line)
        written = write_report(collected, out, kinds=kinds, formats=formats, say=console.note)
        console.note(f"{len(written)} files in {out}, page {written[-1]}")


def _with_answers(
    runs: Sequence[ReportedRun],
    out: Path,
    keys: Sequence[str],
    ask: bool,
    console: Console,
    *,
    last_layers: bool,
) -> list[ReportedRun]:
    from fastkd.runs.activations import keep_activations
    from fastkd.runs.kept_answers import FOLDER, keep_answers

    if not ask and not (out / FOLDER).is_dir():
        return list(runs)
    runs = keep_answers(runs, out, keys, ask=ask, say=console.note)
    return keep_activations(runs, out, keys, ask=ask, say=console.note) if last_layers else runs


def _listed(text: str | None) -> list[str] | None:
    """`a,b` as words."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UserError("--figures and --formats take names with commas: --formats png,pdf")
    return words


def _refuse(options: argparse.Namespace, flag: str) -> None:
    if options.words or options.leaderboard or options.predict:
        raise UserError(f"{flag} only shows which figures there are: leave out the rest")
