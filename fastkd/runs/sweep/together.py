"""Runs that share data, views and teacher, trained in one process that gives each step to all.

One batch is read and shown to the teacher, then every student learns from it. Each run has its own
folder, and ends with the bits that it would have alone (tests/runs/test_together.py).

Flow: `running` calls this for every group of `grouping`; the runs themselves are those of
`runs.stages`, which stop between their steps.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastkd.errors import Interrupted, RunFailed
from fastkd.output.group_console import GroupConsole
from fastkd.recipe.schema import Recipe
from fastkd.runs.shared import Shared
from fastkd.runs.stages import Session, run_in_turns
from fastkd.runs.sweep.grid import Choice
from fastkd.runs.sweep.launching import HOW_TO_RESUME
from fastkd.training.interrupt import StopSignal
from fastkd.training.progress import Position
from fastkd.training.sharing import SharedBatches

__all__ = ["run_group"]

Found = dict[Choice, dict[str, Any]]


@dataclass(eq=False)
class _Run:
    """One of a group."""

    choice: Choice
    label: str
    turns: Generator[Position | None, None, dict[str, Any]]
    at: Position | None = None
    """Where its student is; None before it is built."""


@torch.enable_grad()
def run_group(
    recipes: Mapping[Choice, Recipe], labels: Mapping[Choice, str], session: Session, found: Found
) -> None:
    """Train the recipes of a group; their summaries are put into `found` as they arrive.

    A run that fails does not stop the others.

    Raises:
        UserError: the first mistake of a run. Before the first step nothing is left of the others;
            later they save their state.
        Interrupted: Ctrl-C, SIGTERM or a closed terminal, after all have saved their state.
    """
    screen = GroupConsole(session.console)
    stop = StopSignal()
    shared = Shared(session.console, stop, SharedBatches())
    runs: list[_Run] = []
    for choice, recipe in recipes.items():
        own = replace(session, console=screen.of(labels[choice], recipe.name))
        turns = run_in_turns(recipe, own, shared, resume="auto")
        runs.append(_Run(choice, labels[choice], turns))
    try:
        _build(runs, screen, found)
        _train(runs, screen, found, stop)
    finally:
        for run in runs:
            run.turns.close()


def _build(runs: list[_Run], screen: GroupConsole, found: Found) -> None:
    """Bring all students before their first step: first everything is tried, then built.

    Nothing is built between steps, because that forgets what is compiled.
    """
    while waiting := [run for run in runs if run.at is None and run.choice not in found]:
        for run in waiting:
            try:
                _advance(run, screen, found)
            except Interrupted as stopped:
                raise Interrupted(
                    f"{stopped} (this run alone; {HOW_TO_RESUME})", stopped.exit_code
                ) from None


def _train(runs: list[_Run], screen: GroupConsole, found: Found, stop: StopSignal) -> None:
    """Give each step to all runs; after a resume those that are behind come first."""
    ended: dict[Choice, Exception] = {}
    with stop:
        while going := [one for one in runs if one.choice not in found and one.choice not in ended]:
            run = min(going, key=lambda one: one.at or (0, 0))
            try:
                _advance(run, screen, found)
            except Exception as error:
                ended[run.choice] = error
                # Whatever it is: the others save their state and stop, as after Ctrl-C.
                stop.code = stop.code or RunFailed.exit_code
    for error in ended.values():
        if not isinstance(error, Interrupted):
            raise error
    if stop.code:
        saved = (
            f"with {len(ended)} runs under way, whose state is saved"
            if ended
            else "after these runs"
        )
        raise Interrupted(f"stopped {saved}; {HOW_TO_RESUME}", stop.code)


def _advance(run: _Run, screen: GroupConsole, found: Found) -> None:
    """Let a run go to its next stop, or to its end."""
    try:
        run.at = next(run.turns)
        return
    except StopIteration as end:
        found[run.choice] = end.value
    except RunFailed as error:
        screen.console.note(f"{run.label} failed: {error}")
        found[run.choice] = {"note": "failed"}
    screen.leave(run.label)
