"""Runs of a report side by side: named by what differs, with their baselines, rows and verdict.

Flow: `collect` takes what `fastkd.report.runs_read` found; the figures are drawn of its runs, the
table is made of its rows. The same functions serve `fastkd table` and the tables of sweeps.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.report.gains import is_alone, pair_of, verdict_lines
from fastkd.report.labels import Choice, differences, labels
from fastkd.report.rows import rows_of, visible_rows, without_seed
from fastkd.report.runs_read import ReportedRun, read_run

__all__ = ["Collected", "collect", "recipe_of"]


@dataclass(frozen=True)
class Collected:
    """All that the runs of a report say together."""

    runs: list[ReportedRun]
    rows: list[dict[str, Any]]
    """As `fastkd.output.table` takes them: the runs, then the means over seeds."""
    verdicts: list[str]
    """One sentence for every mean with a baseline; empty where there are no seeds."""

    def of(self, runs: list[ReportedRun]) -> "Collected":
        """The same of runs that know more, such as their networks' answers."""
        return replace(self, runs=runs)


def collect(runs: Sequence[ReportedRun]) -> Collected:
    """Name the runs, find their baselines, and make rows and verdicts of them."""
    recipes = {run.path: found for run in runs if (found := recipe_of(run)) is not None}
    choices = differences({path: recipe.dotted() for path, recipe in recipes.items()})
    groups = {path: without_seed(choice) for path, choice in choices.items()}
    named = labels(list(dict.fromkeys([*choices.values(), *groups.values()])))
    told: list[ReportedRun] = []
    for run in runs:
        if run.path not in recipes:
            told.append(replace(run, group=run.label))
            continue
        label = named[choices[run.path]] or run.name
        group = named[groups[run.path]] or run.name
        alone = _alone_of(run, recipes)
        told.append(replace(run, label=label, group=group, alone=alone))
    rows = _rows(told, recipes, choices)
    return Collected(told, rows, verdict_lines(rows))


def recipe_of(run: ReportedRun) -> Recipe | None:
    """The recipe of a run; None, with a warning, where this version of fastkd cannot read it.

    A run of `fastkd.distill` has none.
    """
    if run.of_distill:
        return None
    try:
        return load_recipe(None, config=run.path / "config.yaml")
    except UserError as error:
        warnings.warn(f"{run.path}: only its numbers are read: {error}", stacklevel=2)
        return None


def _rows(
    runs: Sequence[ReportedRun], recipes: Mapping[Path, Recipe], choices: Mapping[Path, Choice]
) -> list[dict[str, Any]]:
    found: dict[Choice, dict[str, Any]] = {}
    for run in runs:
        if run.path in recipes:
            # An unfinished run enters no mean and has no gain.
            found[choices[run.path]] = run.summary or {}
    made = rows_of({choices[path]: recipe for path, recipe in recipes.items()}, found)
    by_choice = {choices[run.path]: run for run in runs if run.path in recipes}
    rows: list[dict[str, Any]] = []
    for row in visible_rows(made):
        run = by_choice.get(row["choice"]) if row["row"] == "run" else None
        so_far = _so_far(run) if run and not run.finished else {}
        rows.append({**row, **so_far})
    others = [run for run in runs if run.path not in recipes]
    return rows + [
        {"run": run.label, "row": "run", **(run.summary or _so_far(run))} for run in others
    ]


def _so_far(run: ReportedRun) -> dict[str, Any]:
    last, best = run.last_and_best()
    epochs = run.history[-1].get("epoch", len(run.history)) if run.history else 0
    planned = run.key("epochs")
    of = f" of {planned}" if planned else ""
    return {
        f"{run.metric}_last": last,
        f"{run.metric}_best": best,
        "note": f"not finished: epoch {epochs}{of}",
    }


def _alone_of(run: ReportedRun, recipes: Mapping[Path, Recipe]) -> Path | None:
    """The run's own baseline, or the best among the runs that are it."""
    own = recipes[run.path]
    if not own.teacher:
        return None
    if alone := (run.summary or {}).get("alone"):
        for config in sorted(run.path.glob("alone/*/config.yaml")):
            inside = _read(config.parent)
            if inside and (inside.summary or {}).get("digest") == alone.get("digest"):
                return config.parent
    wanted = pair_of(own)
    found: dict[Path, float] = {}
    for path, recipe in recipes.items():
        if recipe.teacher is None and is_alone(recipe) and pair_of(recipe) == wanted:
            inside = _read(path)
            last, _ = inside.last_and_best() if inside else (None, None)
            if last is not None:
                found[path] = last
    return max(found, key=lambda path: found[path], default=None)


def _read(folder: Path) -> ReportedRun | None:
    try:
        return read_run(folder)
    except UserError:
        return None
