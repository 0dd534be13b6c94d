"""`fastkd compare` and `fastkd table`: several runs in one table."""

import argparse
import warnings
from pathlib import Path
from typing import Any

from fastkd.cli.running import run_all, swept
from fastkd.errors import UserError
from fastkd.output.call_record import read_call
from fastkd.output.console import Console
from fastkd.output.run_folder import RunFolder
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.report.gains import verdict_lines
from fastkd.report.labels import Choice, differences
from fastkd.report.rows import rows_of, visible_rows
from fastkd.runs.sweep.baselines import with_baselines
from fastkd.runs.sweep.grid import check_sweep, combinations
from fastkd.runs.sweep.table import FORMATS

__all__ = ["compare", "table"]


def compare(options: argparse.Namespace) -> int:
    """Train all recipes with all seeds, and their students alone."""
    names = list(dict.fromkeys(word for word in options.words if "=" not in word))
    overrides = [word for word in options.words if "=" in word]
    for name in names:
        if name.endswith((".yaml", ".yml")):
            raise UserError(
                f"{name} is a file, and compare takes named recipes: fastkd train --config {name}"
            )
    choices = [
        (f"recipe={name}", *choice, *seed)
        for name in names
        for choice in (combinations(options.sweep) if options.sweep else [()])
        for seed in _seeds(options)
    ]
    if any(key.startswith("recipe=") for choice in choices for key in choice[1:]):
        raise UserError("compare takes recipes by name, without recipe=: fastkd compare A B")
    if not choices:
        raise UserError("name the recipes to compare: fastkd compare RECIPE RECIPE --seeds 3")
    recipes = swept(choices, overrides)
    check_sweep(recipes)
    as_named = any(word.startswith("baseline.lrs=") for word in overrides)
    every, baselines = with_baselines(recipes, as_named=as_named)
    note = f"{len(recipes)} runs"
    if baselines:
        note += f", and {baselines} of students alone to compare with (baseline.lrs= omits them)"
    return run_all(every, options, formats=options.formats, note=note)


def _seeds(options: argparse.Namespace) -> list[Choice]:
    if options.seeds is None:
        return [()]
    for given in (*options.words, *options.sweep):
        if given.startswith("seed="):
            raise UserError(f"--seeds {options.seeds} and {given} exclude each other: keep one")
    return [(f"seed={seed}",) for seed in range(options.seeds)]


def table(options: argparse.Namespace) -> None:
    """Print finished runs side by side, each named by what differs among them."""
    # The shell's runs/RECIPE/* also finds what a sweep writes beside its runs.
    words = [word for word in options.words if not Path(word).name.startswith("sweep-")]
    folders = list(dict.fromkeys(map(Path, words)))
    summaries = {f: found for f in folders if (found := _summary_of(f)) is not None}
    if not summaries:
        raise UserError("name the folders of finished runs: fastkd table runs/RECIPE/*")
    recipes = {folder: _recipe_of(folder) for folder in summaries}
    choices = differences(recipes)
    rows = rows_of(
        {choices[folder]: recipe for folder, recipe in recipes.items()},
        {choices[folder]: summary for folder, summary in summaries.items()},
    )
    if not options.formats:
        console = Console()
        console.comparison(visible_rows(rows))
        for line in verdict_lines(rows):
            console.note(line)
    for name in options.formats:
        print(FORMATS[name](visible_rows(rows)), end="")


def _recipe_of(folder: Path) -> Recipe:
    if read_call(folder) is not None:
        raise UserError(
            f"{folder} is a run of fastkd.distill, which has no keys to tell it from others: its "
            f"numbers are in {folder / 'summary.json'} and metrics.csv"
        )
    return load_recipe(None, config=folder / "config.yaml")


def _summary_of(folder: Path) -> dict[str, Any] | None:
    """None, with a note, for a run that is not finished."""
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    summary = RunFolder.open(folder).summary()
    if summary is None:
        warnings.warn(f"{folder} is not finished and left out", stacklevel=2)
    return summary
