"""The runs of a sweep in processes of their own, where a launcher puts them.

`running` decides which runs. A launcher starts them and tells how each ended: as processes of this
host (`jobs`), tasks of Ray (`on_ray`) or jobs of SLURM (`on_submitit`). Every run writes its output
to a log next to the run folders.
"""

import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

from fastkd.errors import Interrupted, UserError
from fastkd.recipe.printing import recipe_to_yaml
from fastkd.recipe.schema import Recipe
from fastkd.runs.stages import Session
from fastkd.runs.sweep.process import End, Order
from fastkd.storage.atomic import writing
from fastkd.training.interrupt import StopSignal

__all__ = ["HOW_TO_RESUME", "Launcher", "UnderWay", "launch"]

HOW_TO_RESUME = "run the same command again to resume the whole sweep"


class UnderWay(Protocol):
    """A run in the hands of a launcher."""

    @property
    def where(self) -> str:
        """For the user: `job 1`."""
        ...

    def end(self) -> End | None:
        """How it ended; None while it waits or runs."""
        ...

    def stop(self) -> None:
        """Let it save its state and end, or not begin; `end` tells when it has."""
        ...


class Launcher(Protocol):
    """Starts each run in a process of its own."""

    look_again_s: float
    """Seconds between two questions whether a run has ended."""

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What its runs compute on."""
        ...

    def prepare(self, runs: int) -> int:
        """Told once how many runs there are; how many of them go at a time."""
        ...

    def start(self, order: Order) -> UnderWay:
        """Start a run, or put it into a queue; not more at a time than `prepare` has said."""
        ...


def launch(recipes: Mapping[str, Recipe], session: Session, launcher: Launcher) -> set[str]:
    """Run every recipe; the names of those that are done. One that fails does not stop the others.

    recipes: by their printed name.

    Raises:
        UserError: the launcher cannot start them, or the first mistake that a process found.
        Interrupted: Ctrl-C, SIGTERM or a closed terminal, after all processes have ended.
    """
    room = launcher.prepare(len(recipes))
    waiting, running = dict(recipes), dict[str, UnderWay]()
    done = set[str]()
    with _token(session.root) as token, StopSignal() as stop:
        try:
            while (waiting or running) and not stop.code:
                while waiting and len(running) < room and not stop.code:
                    name = next(iter(waiting))
                    order = _order(waiting.pop(name), session.root, token)
                    running[name] = launcher.start(order)
                    log = session.root / order.log.relative_to(order.root)
                    session.console.note(f"{name}, {running[name].where}, {log}")
                for name, run in list(running.items()):
                    if (end := run.end()) is None:
                        continue
                    del running[name]
                    said = end.said.removeprefix("fastkd: ")
                    if end.code == UserError.exit_code:
                        raise UserError(f"{name}: {said}")
                    if not end.code:
                        done.add(name)
                    ended = f"failed (exit code {end.code}): {said}" if end.code else "done"
                    session.console.note(f"{name}: {ended}")
                time.sleep(launcher.look_again_s)
        finally:
            # They save their state, as with Ctrl-C.
            for run in running.values():
                run.stop()
            while any(run.end() is None for run in running.values()):
                time.sleep(launcher.look_again_s)
    if stop.code:
        raise Interrupted(f"stopped with {len(running)} runs under way; {HOW_TO_RESUME}", stop.code)
    return done


def _order(recipe: Recipe, root: Path, token: Path) -> Order:
    digest = recipe.digest()[:8]
    log = root.absolute() / recipe.name / f"sweep-{digest}.log"
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
    return Order(
        title=f"{recipe.name} {digest}",
        recipe=recipe_to_yaml(recipe.absolute()),
        root=root.absolute(),
        log=log,
        token=token,
    )


@contextmanager
def _token(root: Path) -> Iterator[Path]:
    """A file in the folder of all runs, by which a host shows that it sees the same folder."""
    token = root.absolute() / f".sweep-{uuid.uuid4().hex}"
    with writing(token):
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
    try:
        yield token
    finally:
        token.unlink(missing_ok=True)
