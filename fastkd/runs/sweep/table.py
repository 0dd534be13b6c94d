"""The table of a sweep, as `fastkd.report.rows` makes its rows: on the screen and in a CSV file.

The CSV file lies next to the run folders; Markdown and LaTeX show the same rows.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.errors import RunFailed
from fastkd.evaluation.headline import headline_of
from fastkd.output.run_folder import csv_text
from fastkd.output.table import as_latex, as_markdown
from fastkd.recipe.schema import Recipe
from fastkd.report.gains import verdict_lines
from fastkd.report.labels import Choice
from fastkd.report.rows import rows_of, visible_rows, without_seed
from fastkd.runs.stages import Session
from fastkd.storage.atomic import atomic_path, writing

__all__ = [
    "FORMATS",
    "different_teachers",
    "print_table",
    "same_images",
]

FORMATS = {"latex": as_latex, "markdown": as_markdown}
"""What a table can also be printed as."""


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
    for line in verdict_lines(rows):
        session.console.note(line)
    for name in formats:
        for line in FORMATS[name](visible_rows(rows)).splitlines():
            session.console.note(line)


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
        alike.setdefault(without_seed(choice), []).append(recipe)
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
