"""What a tracker is: one small protocol, and the values that it is given and gives back.

Flow: `tracking.Tracking` holds the sinks of a run folder and calls them on rank 0. A sink may raise
whatever its package raises: `Tracking` makes one warning of it, and the training goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

__all__ = [
    "PROJECT",
    "Ending",
    "Kept",
    "Sink",
    "Started",
    "TrackedRun",
    "TrackerName",
    "final_numbers",
    "scalars",
]

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
"""The trackers. `opening.TRACKERS` has the sink of each, recipes and `distill` read the names."""

Ending = Literal["stopped", "failed", "broken"]
"""How a run ends before its time: asked to stop, by an error, or the tracker itself has failed."""

PROJECT = "fastkd"
"""Project or experiment, where neither the user nor the environment names one."""


@dataclass(frozen=True)
class TrackedRun:
    """One run folder, as a tracker sees it."""

    folder: Path
    name: str
    group: str
    """The runs of one sweep, or the stages of one run."""
    stage: str
    """`teacher`, `encoder`, `alone` or `student`."""
    config: Mapping[str, Any]
    """Plain values by dotted key."""


@dataclass(frozen=True)
class Kept:
    """What trackers.json remembers of one tracker."""

    id: str
    """Of the remote run; empty where the run folder is all that is needed."""
    at: str
    """Where it is, for people: an address or a folder."""
    rows: int
    """Rows that it has been given and has taken."""
    open: bool = True
    """Whether it was under way when this was written: if it still is, the process was killed."""


@dataclass(frozen=True)
class Started:
    """A remote run that takes rows."""

    id: str
    at: str
    rows: int
    """Rows that it has. Those up to there are not sent again, the others are."""
    said: str = ""
    """One line for the user."""


class Sink(Protocol):
    """One tracker of one run folder. Made on every rank, started on rank 0 alone."""

    package: ClassVar[str]
    """What must be installed."""
    extra: ClassVar[str]
    """The extra of fastkd that installs it."""

    @classmethod
    def problem(cls) -> str:
        """Why it cannot be used here although it is installed, and what to do; empty if it can."""
        ...

    def start(self, run: TrackedRun, kept: Kept | None, rows: int) -> Started:
        """Begin a remote run, or continue the one that is kept.

        rows: epochs that the run has; it may have fallen behind what the tracker was given.
        """
        ...

    def row(self, row: Mapping[str, Any]) -> None:
        """Take one row of metrics.jsonl."""
        ...

    def finish(
        self,
        summary: Mapping[str, Any],
        files: Sequence[Path],
        table: Sequence[Mapping[str, Any]],
    ) -> None:
        """Take what the whole run came to, and end the remote run.

        summary: as in summary.json. files: pictures. table: rows of the closing table, or none.
        """
        ...

    def close(self, ending: Ending) -> None:
        """End the remote run before its time, so that it can be continued."""
        ...


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics, without its epoch: `train_loss` becomes `train/loss`.

    All trackers group by what precedes the slash.
    """
    found: dict[str, float] = {}
    for name, value in row.items():
        if name != "epoch" and isinstance(value, int | float):
            kind, underscore, rest = name.partition("_")
            grouped = underscore and kind in ("train", "val")
            found[f"{kind}/{rest}" if grouped else name] = value
    return found


def final_numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """The plain numbers of a summary, as `final/accuracy_best`."""
    numbers = {key: value for key, value in summary.items() if isinstance(value, int | float)}
    return {f"final/{k}": value for k, value in numbers.items() if not isinstance(value, bool)}
