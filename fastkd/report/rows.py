"""Runs as rows of a table: one per run, then mean, deviation and standard error over the seeds.

Flow: `rows_of` takes recipes and summaries, of a sweep that has just ended or of folders that were
read again; `fastkd.output.table` lays the rows out. What they gain: `fastkd.report.gains`.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastkd.evaluation.headline import headline
from fastkd.recipe.schema import Recipe
from fastkd.report.gains import Gain, gains, paired, reached_alone, standard_error, unpaired
from fastkd.report.labels import Choice, labels
from fastkd.report.paper import paper_row

__all__ = ["rows_of", "visible_rows", "without_seed"]

RUN, MEAN, DEVIATION, ERROR, PAPER = "run", "mean", "standard deviation", "standard error", "paper"


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
        recipe = recipes[runs[0]["choice"]]
        over = _gained(runs, reached_alone(recipe, recipes, found)) if recipe.teacher else None
        rows += _over_seeds(rest, runs, named[rest], recipe, over)
    return rows


def _of_teacher(summary: Mapping[str, Any]) -> float | None:
    return (summary.get("teacher") or {}).get(headline(summary))


def without_seed(choice: Choice) -> Choice:
    """What a run shares with those of other seeds."""
    return tuple(key for key in choice if not key.startswith("seed="))


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[Choice, list[Mapping[str, Any]]]:
    """Finished runs that differ only in the seed, by what they share."""
    groups: dict[Choice, list[Mapping[str, Any]]] = {}
    for row in rows:
        rest = without_seed(row["choice"])
        if rest != row["choice"] and headline(row) + "_last" in row:
            groups.setdefault(rest, []).append(row)
    return {rest: runs for rest, runs in groups.items() if len(runs) > 1}


def _over_seeds(
    rest: Choice,
    runs: Sequence[Mapping[str, Any]],
    name: str,
    recipe: Recipe,
    gained: Gain | None,
) -> list[dict[str, Any]]:
    """Mean, sample standard deviation, standard error and the paper's number of such a group."""
    metric = headline(runs[0])
    keys = (f"{metric}_last", f"{metric}_best")
    mean, deviation, error = _statistics(runs, keys)
    both = (("std", deviation), ("se", error))
    note = "; ".join(f"{w} {', '.join(f'{100 * one[k]:.2f}' for k in keys)}" for w, one in both)
    about = {"run": f"{name} mean of {len(runs)}".lstrip(), "choice": rest, "runs": len(runs)}
    if gained:
        mean["gain"], error["gain"] = gained.mean, gained.error
    made = [
        about | mean | {"row": MEAN, "note": note, "gain_se": error.get("gain"), "gained": gained},
        about | {"row": DEVIATION} | deviation,
        about | {"row": ERROR} | error,
    ]
    paper = paper_row(recipe.name, recipe.dotted(), mean)
    if paper and paper.row:
        made.append({"choice": rest, "row": PAPER} | paper.row)
    return made


def _gained(runs: Sequence[Mapping[str, Any]], alone: Sequence[float]) -> Gain | None:
    """Paired where every run has its baseline, else over all students alone, if there are any."""
    differences = [run["gain"] for run in runs if run["gain"] is not None]
    if len(differences) == len(runs):
        return paired(differences)
    return unpaired([run[f"{headline(run)}_last"] for run in runs], alone)


def _statistics(
    runs: Sequence[Mapping[str, Any]], measured: Sequence[str]
) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
    """Mean, sample standard deviation and standard error of what every run has measured."""
    mean: dict[str, Any] = {}
    deviation: dict[str, float] = {}
    error: dict[str, float] = {}
    for key in (*measured, "of_teacher", "gain", "images_per_s"):
        values = [run[key] for run in runs if run.get(key) is not None]
        if len(values) == len(runs):
            mean[key], deviation[key] = statistics.mean(values), statistics.stdev(values)
            error[key] = standard_error(values)
    for key in ("params", "macs"):
        values = {run.get(key) for run in runs}
        mean[key] = values.pop() if len(values) == 1 else None
    return mean, deviation, error
