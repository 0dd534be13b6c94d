"""`--sweep key=a;b;c`: the same recipe once for every value, one run after another, then a table.

Each combination is a run of its own with its own folder, so a sweep that was broken off goes on
when the same command is given again: what is finished is found by its digest and not repeated.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fastkd.distributed import on_main
from fastkd.errors import Interrupted, RunFailed, UserError
from fastkd.recipe.schema import Recipe
from fastkd.report.run_folder import find_finished
from fastkd.run import Session, run_recipe

__all__ = ["check_sweep", "combinations", "run_sweep"]

Choice = tuple[str, ...]
"""The overrides of one run: ("optim.lr=0.1", "seed=0")."""


def combinations(sweeps: Sequence[str]) -> list[Choice]:
    """["optim.lr=0.1;0.2", "seed=0;1"] -> the four choices, the last key changing fastest."""
    axes: dict[str, list[str]] = {}
    for text in sweeps:
        key, _, values = text.partition("=")
        if not key or ";" not in values or not all(values.split(";")):
            raise UserError(
                f"--sweep {text}: expected a key and at least two values, in quotes because of the "
                f"semicolon: --sweep 'optim.lr=0.05;0.1'"
            )
        if key in axes:
            raise UserError(f"--sweep names {key} twice: join the values by semicolons")
        axes[key] = [f"{key}={value}" for value in values.split(";")]
    return list(itertools.product(*axes.values()))


def check_sweep(recipes: Mapping[Choice, Recipe]) -> None:
    """UserError where two choices would be the same run or share a folder."""
    if len({(recipe.device, recipe.deterministic) for recipe in recipes.values()}) > 1:
        raise UserError("--sweep cannot change device or deterministic: they hold for a process")
    seen: dict[str, Choice] = {}
    for choice, recipe in recipes.items():
        if recipe.out is not None:
            raise UserError("a sweep makes a run folder for each value: leave out= away")
        if (digest := recipe.digest()) in seen:
            both = f"{' '.join(seen[digest])} and {' '.join(choice)}"
            raise UserError(f"--sweep: {both} are the same run; sweep over keys that change it")
        seen[digest] = choice


def run_sweep(recipes: Mapping[Choice, Recipe], session: Session) -> int:
    """Run what is not finished yet, print the table; the exit code, 1 where a run failed.

    On one process a failed run (such as one that diverged) does not stop the others.
    """
    rows: list[dict[str, Any]] = []
    failed = 0
    for number, (choice, recipe) in enumerate(recipes.items(), 1):
        name = " ".join(choice)
        summary = on_main(session.world, lambda recipe=recipe: _finished(recipe, session))
        if summary is not None:
            session.console.note(f"sweep {number}/{len(recipes)}: {name}, finished before")
        else:
            session.console.note(f"sweep {number}/{len(recipes)}: {name}")
            try:
                summary = run_recipe(recipe, session, resume="auto")
            except RunFailed as error:
                if session.world.size > 1:
                    raise
                session.console.note(f"failed: {error}")
                summary, failed = {"note": "failed"}, failed + 1
            except Interrupted as stopped:
                raise Interrupted(
                    f"{stopped} (this run alone; the whole sweep goes on with its own command)",
                    stopped.exit_code,
                ) from None
        rows.append({"note": "", **summary, "run": name})
    session.console.comparison(rows)
    return 1 if failed else 0


def _finished(recipe: Recipe, session: Session) -> dict[str, Any] | None:
    return find_finished(session.root, recipe.name, recipe.digest())
