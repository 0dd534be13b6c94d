"""TensorBoard events in the run folder, one point per epoch and metric (`track=tensorboard`).

Flow: `tracking` calls it. The numbers equal metrics.jsonl; a resumed run tells TensorBoard to drop
what comes after its checkpoint. Pictures stay where they are: the run folder has them already.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from fastkd.output.table import as_markdown
from fastkd.output.trackers.sink import Ending, Kept, Started, TrackedRun, scalars

__all__ = ["TensorBoardSink"]


class TensorBoardSink:
    """The event files in `<run>/tensorboard`."""

    package: ClassVar[str] = "tensorboard"
    extra: ClassVar[str] = "logging"

    def __init__(self) -> None:
        self._writer: Any = None
        self._epoch = 0

    @classmethod
    def problem(cls) -> str:
        """There is none: it writes files only."""
        return ""

    def start(self, run: TrackedRun, kept: Kept | None, rows: int) -> Started:
        """Open a new event file, which drops the events of epochs that the run does not have."""
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        self._epoch = min(kept.rows, rows) if kept else 0
        self._writer = SummaryWriter(str(folder), purge_step=self._epoch + 1)
        if kept is None:
            lines = [f"| {key} | {_cell(value)} |" for key, value in run.config.items()]
            self._writer.add_text("config", "\n".join(["| key | value |", "| --- | --- |", *lines]))
        return Started("", str(folder), self._epoch)

    def row(self, row: Mapping[str, Any]) -> None:
        """Add the numbers of one row at its epoch, and flush them."""
        self._epoch = row["epoch"]
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, self._epoch)
        self._writer.flush()

    def finish(
        self,
        summary: Mapping[str, Any],
        files: Sequence[Path],
        table: Sequence[Mapping[str, Any]],
    ) -> None:
        """Add the closing table, and finish the file."""
        if table:
            self._writer.add_text("table", as_markdown(table), self._epoch)
        self._writer.close()

    def close(self, ending: Ending) -> None:
        """Finish the file."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
