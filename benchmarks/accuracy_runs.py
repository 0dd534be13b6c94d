"""What the scripts share that measure accuracies seed by seed: their words, runs, rows and cells.

`cifar10_methods.py`, `compress_on_cifar10.py`, `cycle_on_cifar10.py`, `precision_on_cifar10.py`
and `segmentation_on_camvid.py` train recipes, print a row for each run, and end with one table of
means and spreads.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from fastkd.output.run_folder import find_finished
from fastkd.recipe.schema import Recipe
from fastkd.runs.stages import Session, run_recipe

__all__ = ["difference", "finished", "mean_and_std", "note", "row_line", "spread", "words", "write"]


def words(
    doc: str, *, images: str, writes: str, keys: str | None = None
) -> argparse.ArgumentParser:
    """The options that all these scripts have; each adds its own.

    doc: of the script. images: what --data names. writes: what --write writes. keys: what
    `key=value` is for; None: the script takes none.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data", required=True, help=f"folder with {images}")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"write {writes}")
    if keys is not None:
        parser.add_argument("keys", nargs="*", metavar="key=value", help=keys)
    return parser


def finished(recipe: Recipe, session: Session) -> dict:
    """The summary of a run, which is made now unless it exists."""
    before = find_finished(session.root, recipe.name, recipe.digest())
    found = None if before is None else before.summary()
    return found or run_recipe(recipe, session, resume="auto")


def note(rows: list[dict], row: dict) -> None:
    """Keep the row of a run, and print it."""
    rows.append(row)
    print(json.dumps(row), flush=True)


def write(path: Path, facts: dict) -> None:
    """The raw rows of a script, and what it says about them."""
    path.write_text(json.dumps(facts, indent=1) + "\n")


def spread(values: Sequence[float]) -> float:
    """Their sample standard deviation; NaN of one alone."""
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def mean_and_std(values: Sequence[float]) -> list[str]:
    """Cells of a table; one value alone has no deviation."""
    return [f"{statistics.mean(values):.2%}", f"{spread(values):.2%}" if len(values) > 1 else ""]


def difference(gains: Sequence[float]) -> list[str]:
    """Cells of a table: points gained in every pair of runs, their mean, its standard error."""
    each = " ".join(f"{gain:+.2f}" for gain in gains)
    error = f"{spread(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
    return [each, f"{statistics.mean(gains):+.2f}", error]


def row_line(cells: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return "| " + " | ".join(cells) + " |"
