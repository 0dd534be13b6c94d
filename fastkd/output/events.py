"""TensorBoard events in a run folder, one point per epoch and metric (`tensorboard=true`).

Flow: `RunFolder.append_metrics` passes every row on. The numbers equal metrics.jsonl; a
resumed run tells TensorBoard to drop what comes after its checkpoint.
"""

import importlib.util
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastkd.errors import UserError

__all__ = ["Events", "check_tensorboard"]


def check_tensorboard() -> None:
    """UserError if the package is missing; checked before anything is built."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "tensorboard=true needs the package tensorboard, which is not installed: "
            "pip install tensorboard, or remove the key"
        )


class Events:
    """The event files in `folder`; written by rank 0."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._failed = False

    def row(self, row: Mapping[str, Any]) -> None:
        """Add the numbers of one metric row at its epoch, and flush them.

        The numbers are in metrics.jsonl as well: the first failure is a warning, and ends them.
        """
        if self._failed:
            return
        try:
            self._write(row)
        except Exception as error:  # a thread of tensorboard writes, and passes on what it met
            self._failed = True
            warnings.warn(f"no more events in {self.folder}: {error}", stacklevel=2)

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=row["epoch"])
        for name, value in row.items():
            if name != "epoch" and isinstance(value, int | float):
                # train_loss -> train/loss: TensorBoard groups by what precedes the slash.
                kind, underscore, rest = name.partition("_")
                grouped = underscore and kind in ("train", "val")
                self._writer.add_scalar(f"{kind}/{rest}" if grouped else name, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
            self._writer = None
