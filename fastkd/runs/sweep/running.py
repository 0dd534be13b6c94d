"""Run a sweep: finished runs are found by their digest, the rest is run, then the table.

Each combination is a separate run with its own folder, so a stopped sweep resumes when the same
command is run again. The runs follow each other in this process, take turns in it (`together`), or
run in processes of their own, here or on other hosts (`launching`).
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkd.compute.ranks import on_main
from fastkd.data.config import DataConfig
from fastkd.data.loaders.open import data_facts
from fastkd.errors import Interrupted, RunFailed, UserError
from fastkd.output.run_facts import finished_on
from fastkd.output.run_folder import RunFolder, find_finished
from fastkd.recipe.schema import Recipe
from fastkd.report.labels import labels
from fastkd.runs.dry_run import dry_run, dry_run_together
from fastkd.runs.stages import Session, run_recipe
from fastkd.runs.sweep.grid import Choice, check_networks
from fastkd.runs.sweep.grouping import Group, grouped, in_words
from fastkd.runs.sweep.launching import HOW_TO_RESUME, Launcher, launch
from fastkd.runs.sweep.table import print_table
from fastkd.runs.sweep.together import run_group
from fastkd.storage.facts import DataFacts

__all__ = ["rehearse_sweep", "run_sweep"]

_APPEARS_WITHIN_S = 90.0


def run_sweep(
    recipes: Mapping[Choice, Recipe],
    session: Session,
    *,
    launcher: Launcher | None = None,
    together: bool = False,
    formats: Sequence[str] = (),
) -> int:
    """Run what is not finished yet, print the table; returns the exit code, 1 if a run failed.

    launcher: starts the runs; None: one after the other in this process. together: those that can
    share batches and teacher take turns. formats: what the table is also printed as, `latex` or
    `markdown`.
    In one process a failed run (such as one that diverged) does not stop the others; a run's
    UserError ends the sweep, with the table of what is finished.
    """
    if together and session.world.size > 1:
        raise UserError(
            "--together trains its runs in one process and does not work with torchrun; leave one "
            "of them out"
        )
    check_networks(recipes)
    found: dict[Choice, dict[str, Any]] = {}
    past = _Past(session)
    try:
        _run_all(recipes, past, found, launcher=launcher, together=together)
    except UserError:
        _fill_in(recipes, past, found, "not run")
        if any(len(summary) > 1 for summary in found.values()):
            print_table(recipes, session, found)
        raise
    _fill_in(recipes, past, found, "failed")
    print_table(recipes, session, found, formats)
    return 1 if any(summary == {"note": "failed"} for summary in found.values()) else 0


def _run_all(
    recipes: Mapping[Choice, Recipe],
    past: "_Past",
    found: dict[Choice, dict[str, Any]],
    *,
    launcher: Launcher | None,
    together: bool,
) -> None:
    """Put summaries into `found` as they arrive; other processes' stay in their folders."""
    session = past.session
    waiting: dict[Choice, str] = {}
    for number, (choice, recipe) in enumerate(recipes.items(), 1):
        name = f"sweep {number}/{len(recipes)}: {' '.join(choice)}"
        summary = on_main(session.world, lambda recipe=recipe: past.finished(recipe))
        if summary is not None:
            session.console.note(f"{name}, finished before")
            found[choice] = summary
        elif launcher or together:
            waiting[choice] = name
        else:
            session.console.note(name)
            found[choice] = _run(recipe, session)
    if launcher and waiting:
        wanted = {name: recipes[choice] for choice, name in waiting.items()}
        done = launch(wanted, session, launcher)
        past.await_summaries([wanted[name] for name in done])
    elif len(waiting) == 1:
        ((choice, name),) = waiting.items()
        session.console.note(name)
        found[choice] = _run(recipes[choice], session)
    elif waiting:
        _run_groups({choice: recipes[choice] for choice in waiting}, recipes, session, found)


def rehearse_sweep(recipes: Mapping[Choice, Recipe], session: Session) -> None:
    """Say how the runs would be grouped, and what each group would take; nothing is written."""
    check_networks(recipes)
    named, groups = _grouped(recipes, recipes, session)
    for number, group in enumerate(groups, 1):
        members = {named[choice]: recipes[choice] for choice in group.choices}
        first, *others = members.values()
        found = dry_run_together(members, session) if others else dry_run(first, session)
        session.console.facts(f"dry run of group {number}", found)


def _grouped(
    waiting: Mapping[Choice, Recipe], recipes: Mapping[Choice, Recipe], session: Session
) -> tuple[dict[Choice, str], list[Group]]:
    """Labels of the runs, and the groups of those that wait; says which they are."""
    named = {choice: name or recipes[choice].name for choice, name in labels([*recipes]).items()}
    groups = grouped(waiting, session)
    for line in in_words(groups, named):
        session.console.note(line)
    return named, groups


def _run_groups(
    waiting: Mapping[Choice, Recipe],
    recipes: Mapping[Choice, Recipe],
    session: Session,
    found: dict[Choice, dict[str, Any]],
) -> None:
    """Those that can share together, then the next ones. recipes: of the sweep, to name them."""
    named, groups = _grouped(waiting, recipes, session)
    for group in groups:
        first, *others = group.choices
        if others:
            run_group({one: waiting[one] for one in group.choices}, named, session, found)
        else:
            session.console.note(named[first])
            found[first] = _run(waiting[first], session)


def _fill_in(
    recipes: Mapping[Choice, Recipe],
    past: "_Past",
    found: dict[Choice, dict[str, Any]],
    otherwise: str,
) -> None:
    """The summaries that other processes have written, with a note for each missing one."""
    for choice in recipes.keys() - found.keys():
        found[choice] = past.written(recipes[choice]) or {"note": otherwise}


def _run(recipe: Recipe, session: Session) -> dict[str, Any]:
    try:
        return run_recipe(recipe, session, resume="auto")
    except RunFailed as error:
        if session.world.size > 1:
            raise
        session.console.note(f"failed: {error}")
        return {"note": "failed"}
    except Interrupted as stopped:
        raise Interrupted(
            f"{stopped} (this run alone; {HOW_TO_RESUME})", stopped.exit_code
        ) from None


@dataclass
class _Past:
    """The finished runs of a sweep, as far as their data are still what they saw."""

    session: Session
    data: dict[DataConfig, DataFacts] = field(default_factory=dict)
    """What lies there now, read once for all runs on the same data."""
    outdated: set[Path] = field(default_factory=set)
    """Folders of runs on other data."""

    def finished(self, recipe: Recipe) -> dict[str, Any] | None:
        """The summary of the newest finished run; None if there is none on these data."""
        run = self._newest(recipe)
        if run is None:
            return None
        now = self.data.get(recipe.data) or data_facts(recipe.data)
        self.data[recipe.data] = now
        name, say = recipe.name, self.session.console.note
        found = finished_on(run, now, lambda how: say(f"{name} is run again: {'; '.join(how)}"))
        if found is None:
            self.outdated.add(run.path)
        return found

    def await_summaries(self, recipes: Iterable[Recipe]) -> None:
        """Return when the summaries that other processes have written are seen here, too.

        Of another host's files a network file system may show an old state for a minute.
        """
        deadline = time.monotonic() + _APPEARS_WITHIN_S
        for recipe in recipes:
            while self.written(recipe) is None and time.monotonic() < deadline:
                time.sleep(1)

    def written(self, recipe: Recipe) -> dict[str, Any] | None:
        """Likewise, but only outdated runs are left out: this sweep may have made it."""
        run = self._newest(recipe)
        return run.summary() if run else None

    def _newest(self, recipe: Recipe) -> RunFolder | None:
        run = find_finished(self.session.root, recipe.name, recipe.digest())
        return None if run and run.path in self.outdated else run
