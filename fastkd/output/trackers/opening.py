"""The sink of every tracker by its name, and whether it can be used here.

Flow: `cli` and `fastkd.distill` call `check_trackers` before anything is built; `tracking` makes
the sinks.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from fastkd.errors import UserError
from fastkd.output.trackers.mlflow import MLflowSink
from fastkd.output.trackers.sink import Sink, TrackerName
from fastkd.output.trackers.tensorboard import TensorBoardSink
from fastkd.output.trackers.trackio import TrackioSink
from fastkd.output.trackers.wandb import WandbSink
from fastkd.printable import in_words

__all__ = ["TRACKERS", "check_trackers", "tracker_names"]

TRACKERS: dict[TrackerName, type[Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MLflowSink,
    "trackio": TrackioSink,
}


def check_trackers(names: Iterable[TrackerName]) -> None:
    """UserError if a package is missing, or nobody is logged in; nothing is sent or written."""
    for name in dict.fromkeys(names):
        sink = TRACKERS[name]
        if importlib.util.find_spec(sink.package) is None:
            raise UserError(
                f"track={name} needs the package {sink.package}, which is not installed: "
                f'pip install "fastkd[{sink.extra}]", or leave it out'
            )
        try:
            problem = sink.problem()
        except Exception as error:  # an installed package may fail in any way
            problem = f"{sink.package} does not work here ({in_words(error)}): repair it"
        if problem:
            raise UserError(f"track={name}: {problem}, or leave it out")


def tracker_names(given: object, out: str | Path | None) -> tuple[TrackerName, ...]:
    """The names in an argument of a call: one name, or several in a list.

    Raises:
        UserError: something else, or names without `out`, the folder of the run.
    """
    known: tuple[TrackerName, ...] = get_args(TrackerName)
    words = [given] if isinstance(given, str) else given
    if not isinstance(words, list | tuple | set) or any(word not in known for word in words):
        raise UserError(f"track={given!r}: expected some of {', '.join(known)}, such as 'wandb'")
    if words and out is None:
        raise UserError(
            f"track={given!r} needs out=, the folder that remembers the remote run, so that a "
            f"resumed run continues it"
        )
    return tuple(name for name in known if name in words)
