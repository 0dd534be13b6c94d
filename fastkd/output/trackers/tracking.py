"""The trackers of one run folder: none can stop the training, none gets a row twice or too few.

Flow: `RunFolder` has one of these if the run is tracked. The trainer calls `begin` on rank 0 before
the first step, every row of metrics.jsonl follows, then `finish` or `close`.

A tracker counts as having a row when it says so itself (MLflow and trackio are asked when a run
resumes, of W&B the files are read if it was killed), or else when trackers.json says so, which is
written after the row was taken. A resumed run sends the rows that are missing, and trains those
that its checkpoint has lost again without sending them again: they have the same numbers.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastkd.output.trackers.opening import TRACKERS
from fastkd.output.trackers.record import read_record, write_record
from fastkd.output.trackers.sink import Ending, Kept, Sink, TrackedRun, TrackerName
from fastkd.printable import in_words

__all__ = ["Tracking"]


class Tracking:
    """The sinks of `run`; nothing is started before `begin`."""

    def __init__(self, run: TrackedRun, names: Sequence[TrackerName]) -> None:
        self.run = run
        self.names = tuple(names)
        self._sinks: dict[TrackerName, Sink] = {}
        """Those that are started and have not failed."""
        self._kept: dict[str, Kept] = {}

    def begin(self, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """Start all, and send the rows that they lack; what to tell the user, a line each."""
        said: list[str] = []
        try:
            self._kept = read_record(self.run.folder)
        except (ValueError, OSError) as error:
            # Whose runs they continue is not known: better none than a second one of each.
            warnings.warn(f"this run is not tracked: {error}", stacklevel=2)
            return said
        for name in self.names:
            sink = TRACKERS[name]()
            self._sinks[name] = sink
            with self._guarded(name):
                begun = sink.start(self.run, self._kept.get(name), len(history))
                self._keep(name, Kept(begun.id, begun.at, begun.rows))
                if begun.said:
                    said.append(f"{name}: {begun.said}")
        for row in history:
            self.row(row)
        return said

    def row(self, row: Mapping[str, Any]) -> None:
        """Pass on one row to those that lack it."""
        for name, sink in [*self._sinks.items()]:
            kept = self._kept[name]
            if row["epoch"] <= kept.rows:
                continue
            with self._guarded(name):
                sink.row(row)
                self._keep(name, replace(kept, rows=row["epoch"]))

    def finish(
        self,
        summary: Mapping[str, Any],
        files: Sequence[Path],
        table: Sequence[Mapping[str, Any]],
    ) -> None:
        """Pass on what the run came to, and end the remote runs."""
        for name, sink in [*self._sinks.items()]:
            with self._guarded(name):
                sink.finish(summary, files, table)
                self._keep(name, replace(self._kept[name], open=False))
        self._sinks.clear()

    def close(self, ending: Ending) -> None:
        """End the remote runs that are still under way."""
        for name, sink in [*self._sinks.items()]:
            with self._guarded(name):
                sink.close(ending)
                self._keep(name, replace(self._kept[name], open=False))
        self._sinks.clear()

    def _keep(self, name: TrackerName, kept: Kept) -> None:
        self._kept[name] = kept
        write_record(self.run.folder, self._kept)

    @contextmanager
    def _guarded(self, name: TrackerName) -> Iterator[None]:
        """Whatever a tracker raises is one warning, and it gets nothing more."""
        try:
            yield
        except Exception as error:  # any package, any network
            sink = self._sinks.pop(name)
            warnings.warn(
                f"{name} gets nothing more of this run, which goes on: {in_words(error)}. Every "
                f"row is in {self.run.folder / 'metrics.jsonl'}",
                stacklevel=4,
            )
            with suppress(Exception):
                sink.close("broken")
