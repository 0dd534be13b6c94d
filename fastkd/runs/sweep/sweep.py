"""`--sweep key=a;b;c`: the same recipe once for every value, then a table.

Each combination is a run of its own with its own folder, so a sweep that was broken off goes on
when the same command is given again: what is finished is found by its digest and not repeated.
The runs follow each other in this process, or go side by side in processes of their own
(`sweep_jobs`). Over seeds the table ends with mean and standard deviation; its rows of single runs
are also in a CSV file beside the run folders.
"""

import hashlib
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastkd.compute.ranks import on_main
from fastkd.errors import Interrupted, RunFailed, UserError
from fastkd.evaluation.headline import headline, headline_of
from fastkd.models.registry import create_model, model_options
from fastkd.output.run_folder import csv_text, find_finished
from fastkd.recipe.schema import Recipe
from fastkd.report.paper import paper_row
from fastkd.runs.stages import Session, run_recipe
from fastkd.runs.sweep.jobs import GO_ON, run_jobs
from fastkd.storage.atomic import atomic_path

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


def run_sweep(recipes: Mapping[Choice, Recipe], session: Session, *, jobs: int = 1) -> int:
    """Run what is not finished yet, print the table; the exit code, 1 where a run failed.

    jobs: so many runs at a time. On one process a failed run (such as one that diverged) does not
    stop the others; a run's UserError ends the sweep, with the table of what is finished.
    """
    if jobs > 1 and session.world.size > 1:
        raise UserError(
            "--jobs starts processes of its own and is not for torchrun; leave one away"
        )
    _check_networks(recipes)
    found: dict[Choice, dict[str, Any]] = {}
    try:
        _run_all(recipes, session, jobs, found)
    except UserError:
        _fill_in(recipes, session, found, "not run")
        if any(len(summary) > 1 for summary in found.values()):
            _report(recipes, session, found)
        raise
    _fill_in(recipes, session, found, "failed")
    _report(recipes, session, found)
    return 1 if any(summary == {"note": "failed"} for summary in found.values()) else 0


def _check_networks(recipes: Mapping[Choice, Recipe]) -> None:
    """UserError for a network that cannot be built; those of the zoo are, without memory."""
    seen = set()
    for choice, recipe in recipes.items():
        for net in (recipe.student, *(recipe.teacher.members().values() if recipe.teacher else ())):
            if (key := repr((net.name, net.options()))) in seen:
                continue
            seen.add(key)
            if ":" in net.name and model_options(net.name) is not None:
                continue
            try:
                with torch.device("meta"):
                    create_model(net.name, 10, **net.options())
            except UserError as error:
                raise UserError(f"--sweep: {' '.join(choice)}: {error}") from None


def _run_all(
    recipes: Mapping[Choice, Recipe],
    session: Session,
    jobs: int,
    found: dict[Choice, dict[str, Any]],
) -> None:
    """Summaries into `found`, as they come; those of other processes stay in their folders."""
    wanted: dict[str, Recipe] = {}
    for number, (choice, recipe) in enumerate(recipes.items(), 1):
        name = f"sweep {number}/{len(recipes)}: {' '.join(choice)}"
        summary = on_main(session.world, lambda recipe=recipe: _finished(recipe, session))
        if summary is not None:
            session.console.note(f"{name}, finished before")
            found[choice] = summary
        elif jobs > 1:
            wanted[name] = recipe
        else:
            session.console.note(name)
            found[choice] = _run(recipe, session)
    if wanted:
        run_jobs(wanted, session, jobs)


def _fill_in(
    recipes: Mapping[Choice, Recipe],
    session: Session,
    found: dict[Choice, dict[str, Any]],
    otherwise: str,
) -> None:
    """The summaries that other processes have written, a note in place of those that are not."""
    for choice in recipes.keys() - found.keys():
        found[choice] = _finished(recipes[choice], session) or {"note": otherwise}


def _report(
    recipes: Mapping[Choice, Recipe], session: Session, found: Mapping[Choice, dict[str, Any]]
) -> None:
    rows = [_row(choice, found[choice]) for choice in recipes]
    session.console.comparison(rows + _over_seeds(recipes, found))
    if session.world.is_main:
        session.console.note(f"table {_write_csv(recipes, rows, session.root)}")
    if note := _different_teachers(recipes):
        session.console.note(note)


def _run(recipe: Recipe, session: Session) -> dict[str, Any]:
    try:
        return run_recipe(recipe, session, resume="auto")
    except RunFailed as error:
        if session.world.size > 1:
            raise
        session.console.note(f"failed: {error}")
        return {"note": "failed"}
    except Interrupted as stopped:
        raise Interrupted(f"{stopped} (this run alone; {GO_ON})", stopped.exit_code) from None


def _finished(recipe: Recipe, session: Session) -> dict[str, Any] | None:
    return find_finished(session.root, recipe.name, recipe.digest())


def _write_csv(
    recipes: Mapping[Choice, Recipe], rows: Sequence[Mapping[str, Any]], root: Path
) -> Path:
    """A line for each run beside the folders of the runs: swept keys, digest, results."""
    metric = headline_of(rows)
    results = (f"{metric}_last", f"{metric}_best", "best_epoch", "of_teacher", "params", "macs")
    lines = []
    for (choice, recipe), row in zip(recipes.items(), rows, strict=True):
        keys = dict(override.split("=", 1) for override in choice)
        kept = {key: row.get(key) for key in (*results, "images_per_s", "note")}
        lines.append(keys | {"digest": recipe.digest()} | kept)
    of_all = hashlib.sha256(" ".join(line["digest"] for line in lines).encode()).hexdigest()
    target = root / next(iter(recipes.values())).name / f"sweep-{of_all[:8]}.csv"
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


def _different_teachers(recipes: Mapping[Choice, Recipe]) -> str:
    """A sentence where a key of the student has also made other teachers; else nothing."""
    swept = [override.partition("=")[0] for override in next(iter(recipes))]
    taught = {
        tuple(
            recipe.as_teacher(one).digest()
            for one in recipe.teacher.members().values()
            if one.trains
        )
        for recipe in recipes.values()
        if recipe.teacher
    }
    if len(taught) < 2 or any(key.startswith("teacher.") for key in swept):
        return ""
    return (
        f"note: these runs imitate {len(taught)} different teachers, each trained as its run is: "
        "with its seed, rate, epochs and batches. teacher.seed, teacher.lr and teacher.epochs hold "
        "one, or teacher.weights=RUN, the folder of a trained one"
    )


def _over_seeds(
    recipes: Mapping[Choice, Recipe], found: Mapping[Choice, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for all runs that differ in the seed alone: mean, sample standard deviation, paper."""
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
        paper = paper_row(recipes[choices[0]], row)
        if paper and paper.row:
            rows.append(paper.row)
    return rows
