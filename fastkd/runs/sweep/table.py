"""The table of a sweep: a row per run, then mean, deviation and standard error over the seeds.

`rows_of` makes the rows; the screen, the CSV file next to the run folders, Markdown and LaTeX show
the same ones.
"""

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.errors import RunFailed
from fastkd.evaluation.headline import headline, headline_of
from fastkd.output.run_folder import csv_text
from fastkd.output.table import as_latex, as_markdown
from fastkd.recipe.schema import Recipe
from fastkd.report.paper import paper_row
from fastkd.runs.stages import Session
from fastkd.runs.sweep.baselines import gains
from fastkd.runs.sweep.grid import Choice
from fastkd.runs.sweep.labels import labels
from fastkd.storage.atomic import atomic_path, writing

__all__ = [
    "FORMATS",
    "different_teachers",
    "print_table",
    "rows_of",
    "same_images",
    "visible_rows",
]

FORMATS = {"latex": as_latex, "markdown": as_markdown}
"""What a table can also be printed as."""

RUN, MEAN, DEVIATION, ERROR, PAPER = "run", "mean", "standard deviation", "standard error", "paper"


def print_table(
    recipes: Mapping[Choice, Recipe],
    session: Session,
    found: Mapping[Choice, dict[str, Any]],
    formats: Sequence[str] = (),
) -> None:
    """Print the table of all runs and write its CSV file.

    found: their summaries. formats: of FORMATS, printed too.
    """
    rows = rows_of(recipes, found)
    session.console.comparison(visible_rows(rows))
    if session.world.is_main:
        session.console.note(_written(recipes, rows, session.root))
    for note in filter(None, (different_teachers(recipes), same_images(recipes))):
        session.console.note(note)
    for name in formats:
        for line in FORMATS[name](visible_rows(rows)).splitlines():
            session.console.note(line)


def visible_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of the screen: deviation and error are in the note of the mean."""
    return [row for row in rows if row["row"] not in (DEVIATION, ERROR)]


def rows_of(
    recipes: Mapping[Choice, Recipe], found: Mapping[Choice, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row per run, then those over the seeds; `row` says which it is, `choice` its keys."""
    gained = gains(recipes, found)
    rows = [
        {
            "note": found[choice].get("verdict", ""),
            **found[choice],
            "row": RUN,
            "choice": choice,
            "of_teacher": _of_teacher(found[choice]),
            "gain": gained.get(choice),
        }
        for choice in recipes
    ]
    groups = _groups(rows)
    # Together, so that a run and its mean are named alike.
    named = labels([*recipes, *groups])
    for row in rows:
        # A single run differs from nothing.
        row["run"] = named[row["choice"]] or recipes[row["choice"]].name
    for rest, runs in groups.items():
        rows += _over_seeds(rest, runs, named[rest], recipes[runs[0]["choice"]])
    return rows


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
    """All rows, in a file next to the run folders: swept keys in full, digest, results."""
    metric = headline_of(rows)
    results = ("gain", "of_teacher", "params", "macs", "images_per_s", "note")
    results = (f"{metric}_last", f"{metric}_best", "best_epoch", *results)
    digests = {choice: recipe.digest() for choice, recipe in recipes.items()}
    names = dict.fromkeys(key.partition("=")[0] for choice in recipes for key in choice)
    lines = []
    for row in rows:
        keys = dict(override.split("=", 1) for override in row["choice"])
        line = {"row": row["row"]} | {name: keys.get(name) for name in names}
        line |= {"digest": digests.get(row["choice"]), "runs": row.get("runs", 1)}
        lines.append(line | {key: row.get(key) for key in results})
    of_all = hashlib.sha256(" ".join(digests.values()).encode()).hexdigest()
    folders = {recipe.name for recipe in recipes.values()}
    # Of several recipes, above the folders of all of them.
    target = root / (folders.pop() if len(folders) == 1 else "") / f"sweep-{of_all[:8]}.csv"
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as beside:
        beside.write_text(csv_text(lines), encoding="utf-8")
    return target


def _of_teacher(summary: Mapping[str, Any]) -> float | None:
    return (summary.get("teacher") or {}).get(headline(summary))


def different_teachers(recipes: Mapping[Choice, Recipe]) -> str:
    """A note if a key of the student also changed the teachers; else nothing."""
    # Recipes may have other teachers by their nature.
    by_name: dict[str, set[tuple[str, ...]]] = {}
    swept: set[str] = set()
    for choice, recipe in recipes.items():
        swept |= {override.partition("=")[0] for override in choice}
        if recipe.teacher:
            taught = (recipe.as_teacher(t).digest() for t in recipe.teachers().values() if t.trains)
            by_name.setdefault(recipe.name, set()).add(tuple(taught))
    most = max(map(len, by_name.values()), default=0)
    if most < 2 or any(key.startswith("teacher.") for key in swept):
        return ""
    return (
        f"note: these runs imitate {most} different teachers, each trained like its run: "
        "with its seed, rate, epochs and batches. Set teacher.seed, teacher.lr and "
        "teacher.epochs to share one teacher, or teacher.weights=RUN, the folder of a trained one"
    )


def same_images(recipes: Mapping[Choice, Recipe]) -> str:
    """A note if runs that differ in the seed saw the same images; else nothing."""
    alike: dict[Choice, list[Recipe]] = {}
    for choice, recipe in recipes.items():
        alike.setdefault(_without_seed(choice), []).append(recipe)
    shared = any(
        len({one.seed for one in runs}) > len({one.data_seed for one in runs})
        for runs in alike.values()
    )
    if not shared:
        return ""
    return (
        "note: the seeds share the order of the images and all views of them (data.seed): what "
        "they differ by comes from initial weights and dropout alone"
    )


def _without_seed(choice: Choice) -> Choice:
    return tuple(key for key in choice if not key.startswith("seed="))


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[Choice, list[Mapping[str, Any]]]:
    """Finished runs that differ only in the seed, by what they share."""
    groups: dict[Choice, list[Mapping[str, Any]]] = {}
    for row in rows:
        rest = _without_seed(row["choice"])
        if rest != row["choice"] and headline(row) + "_last" in row:
            groups.setdefault(rest, []).append(row)
    return {rest: runs for rest, runs in groups.items() if len(runs) > 1}


def _over_seeds(
    rest: Choice, runs: Sequence[Mapping[str, Any]], name: str, recipe: Recipe
) -> list[dict[str, Any]]:
    """Mean, sample standard deviation, standard error and the paper's number of such a group."""
    metric = headline(runs[0])
    keys = (f"{metric}_last", f"{metric}_best")
    mean, deviation, error = _statistics(runs, keys)
    both = (("std", deviation), ("se", error))
    note = "; ".join(f"{w} {', '.join(f'{100 * one[k]:.2f}' for k in keys)}" for w, one in both)
    about = {"run": f"{name} mean of {len(runs)}".lstrip(), "choice": rest, "runs": len(runs)}
    made = [
        about | mean | {"row": MEAN, "note": note, "gain_se": error.get("gain")},
        about | {"row": DEVIATION} | deviation,
        about | {"row": ERROR} | error,
    ]
    paper = paper_row(recipe.name, recipe.dotted(), mean)
    if paper and paper.row:
        made.append({"choice": rest, "row": PAPER} | paper.row)
    return made


def _statistics(
    runs: Sequence[Mapping[str, Any]], measured: Sequence[str]
) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
    """Mean, sample standard deviation and standard error of what every run has measured."""
    mean: dict[str, Any] = {}
    deviation: dict[str, float] = {}
    for key in (*measured, "of_teacher", "gain", "images_per_s"):
        values = [run[key] for run in runs if run.get(key) is not None]
        if len(values) == len(runs):
            mean[key], deviation[key] = statistics.mean(values), statistics.stdev(values)
    for key in ("params", "macs"):
        values = {run.get(key) for run in runs}
        mean[key] = values.pop() if len(values) == 1 else None
    return mean, deviation, {key: std / math.sqrt(len(runs)) for key, std in deviation.items()}
