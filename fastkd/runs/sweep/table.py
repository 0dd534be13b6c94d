"""The table of a sweep: a row per run, and mean and standard deviation over seeds.

The rows of single runs are also in a CSV file next to the run folders.
"""

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.errors import RunFailed
from fastkd.evaluation.headline import headline, headline_of
from fastkd.output.run_folder import csv_text
from fastkd.recipe.schema import Recipe
from fastkd.report.paper import paper_row
from fastkd.runs.stages import Session
from fastkd.runs.sweep.grid import Choice
from fastkd.storage.atomic import atomic_path, writing

__all__ = ["different_teachers", "print_table"]


def print_table(
    recipes: Mapping[Choice, Recipe], session: Session, found: Mapping[Choice, dict[str, Any]]
) -> None:
    """Print the table of all runs and write its CSV file. found: their summaries."""
    rows = [_row(choice, found[choice]) for choice in recipes]
    session.console.comparison(rows + _over_seeds(recipes, found))
    if session.world.is_main:
        session.console.note(_written(recipes, rows, session.root))
    if note := different_teachers(recipes):
        session.console.note(note)


def _written(
    recipes: Mapping[Choice, Recipe], rows: Sequence[Mapping[str, Any]], root: Path
) -> str:
    """Where the CSV file is, or why there is none: the runs and the table stand without it."""
    try:
        return f"table {_write_csv(recipes, rows, root)}"
    except RunFailed as error:
        return f"no CSV file: {error}"


def _write_csv(
    recipes: Mapping[Choice, Recipe], rows: Sequence[Mapping[str, Any]], root: Path
) -> Path:
    """One line per run, in a file next to the run folders: swept keys, digest, results."""
    metric = headline_of(rows)
    results = (f"{metric}_last", f"{metric}_best", "best_epoch", "of_teacher", "params", "macs")
    lines = []
    for (choice, recipe), row in zip(recipes.items(), rows, strict=True):
        keys = dict(override.split("=", 1) for override in choice)
        kept = {key: row.get(key) for key in (*results, "images_per_s", "note")}
        lines.append(keys | {"digest": recipe.digest()} | kept)
    of_all = hashlib.sha256(" ".join(line["digest"] for line in lines).encode()).hexdigest()
    target = root / next(iter(recipes.values())).name / f"sweep-{of_all[:8]}.csv"
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as beside:
        beside.write_text(csv_text(lines), encoding="utf-8")
    return target


def _row(choice: Choice, summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "note": "",
        **summary,
        "run": " ".join(choice),
        "of_teacher": _of_teacher(summary),
    }


def _of_teacher(summary: Mapping[str, Any]) -> float | None:
    return (summary.get("teacher") or {}).get(headline(summary))


def different_teachers(recipes: Mapping[Choice, Recipe]) -> str:
    """A note if a key of the student also changed the teachers; else nothing."""
    swept = [override.partition("=")[0] for override in next(iter(recipes))]
    taught = {
        tuple(recipe.as_teacher(one).digest() for one in recipe.teachers().values() if one.trains)
        for recipe in recipes.values()
        if recipe.teacher
    }
    if len(taught) < 2 or any(key.startswith("teacher.") for key in swept):
        return ""
    return (
        f"note: these runs imitate {len(taught)} different teachers, each trained like its run: "
        "with its seed, rate, epochs and batches. Set teacher.seed, teacher.lr and "
        "teacher.epochs to share one teacher, or teacher.weights=RUN, the folder of a trained one"
    )


def _over_seeds(
    recipes: Mapping[Choice, Recipe], found: Mapping[Choice, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for runs that differ only in the seed: mean, sample standard deviation, paper."""
    groups: dict[Choice, list[Choice]] = {}
    for choice in recipes:
        rest = tuple(override for override in choice if not override.startswith("seed="))
        if rest != choice and headline(found[choice]) + "_last" in found[choice]:
            groups.setdefault(rest, []).append(choice)
    rows: list[dict[str, Any]] = []
    for rest, choices in groups.items():
        if len(choices) < 2:
            continue
        runs = [found[choice] for choice in choices]
        metric = headline(runs[0])
        row: dict[str, Any] = {"run": " ".join((*rest, f"mean of {len(runs)}"))}
        stds = []
        for key in (f"{metric}_last", f"{metric}_best"):
            values = [run[key] for run in runs]
            row[key] = statistics.mean(values)
            stds.append(f"{100 * statistics.stdev(values):.2f}")
        teachers = [one for run in runs if (one := _of_teacher(run)) is not None]
        row["of_teacher"] = statistics.mean(teachers) if teachers else None
        rows.append(row | {"note": f"std {', '.join(stds)}"})
        first = recipes[choices[0]]
        paper = paper_row(first.name, first.dotted(), row)
        if paper and paper.row:
            rows.append(paper.row)
    return rows
