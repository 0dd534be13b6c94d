"""trackio (`track=trackio`): a database on this machine, or a Space, as TRACKIO_SPACE_ID says.

Flow: `tracking` calls it. A run is found again by its name, which has a random end for that. Steps
are epochs, so the last step of a resumed run is the last row that trackio has.
"""

import io
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from contextvars import Context
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from fastkd.output.table import as_columns
from fastkd.output.trackers.sink import (
    PROJECT,
    Ending,
    Kept,
    Started,
    TrackedRun,
    final_numbers,
    scalars,
)

__all__ = ["TrackioSink"]


class TrackioSink:
    """One run of trackio; its current run, if the user has one, is left alone."""

    package: ClassVar[str] = "trackio"
    extra: ClassVar[str] = "trackio"

    def __init__(self) -> None:
        self._run: Any = None
        self._epoch = 0

    @classmethod
    def problem(cls) -> str:
        """Nobody is logged in where the Space is."""
        space = os.environ.get("TRACKIO_SPACE_ID")
        if not space:
            return ""
        from huggingface_hub import get_token

        if get_token():
            return ""
        return f"TRACKIO_SPACE_ID={space} needs a login: log in with `hf auth login`, or unset it"

    def start(self, run: TrackedRun, kept: Kept | None, rows: int) -> Started:
        """Begin a run, or continue the one of this name."""
        trackio: Any = import_module("trackio")

        name = kept.id if kept else f"{run.name} {uuid.uuid4().hex[:6]}"
        # `init` ends the current run of its context. Nothing is printed but our own line.
        with redirect_stdout(io.StringIO()):
            self._run = Context().run(
                trackio.init,
                project=PROJECT,
                name=name,
                group=run.group,
                config={"stage": run.stage, **run.config},
                resume="allow",
                embed=False,
            )
        # What was queued when a process was killed is lost, whatever trackers.json says.
        following = getattr(self._run, "_next_step", None)
        known = kept.rows if kept else 0
        self._epoch = known if following is None else max(0, following - 1)
        where = os.environ.get("TRACKIO_SPACE_ID") or "this machine"
        said = f'run "{name}" on {where}; to look at it: trackio show --project {PROJECT}'
        return Started(name, where, self._epoch, said)

    def row(self, row: Mapping[str, Any]) -> None:
        """Log one row at its epoch."""
        self._epoch = row["epoch"]
        self._run.log(scalars(row) | {"epoch": self._epoch}, step=self._epoch)

    def finish(
        self,
        summary: Mapping[str, Any],
        files: Sequence[Path],
        table: Sequence[Mapping[str, Any]],
    ) -> None:
        """Log final numbers, pictures and table one step behind the last epoch, and end the run."""
        trackio: Any = import_module("trackio")

        closing: dict[str, Any] = {file.stem: trackio.Image(str(file)) for file in files}
        if table:
            titles, cells = as_columns(table)
            closing["table"] = trackio.Table(columns=titles, data=cells)
        self._run.log(final_numbers(summary) | closing, step=self._epoch + 1)
        self.close("stopped")

    def close(self, ending: Ending) -> None:
        """Write what is queued; a run of trackio has no state."""
        if self._run is not None and ending != "broken":
            with redirect_stdout(io.StringIO()):
                self._run.finish()
