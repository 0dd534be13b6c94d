"""Weights & Biases (`track=wandb`), also offline and disabled, as WANDB_MODE says.

Flow: `tracking` calls it. Steps are epochs, and `epoch` is the axis of every curve. What wandb
itself keeps is in `<run>/wandb`, or where WANDB_DIR says. An offline run that is resumed has one
folder for each part there, with the same run id; `wandb sync` sends them in order.
"""

import io
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from importlib import import_module
from pathlib import Path
from shlex import quote
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
from fastkd.output.trackers.wandb_log import last_epoch

__all__ = ["WandbSink"]

_WITHOUT_LOGIN = ("offline", "disabled", "dryrun")
# What wandb shows as failed and as killed.
_EXIT_CODES = {"failed": 1, "stopped": 255}
_FINISH_S = 120
"""How long the end of a run waits for uploads; the rest stays on the disk for `wandb sync`."""


class WandbSink:
    """One run of W&B; the global run of wandb, if the user has one, is left alone."""

    package: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "wandb"

    def __init__(self) -> None:
        self._run: Any = None
        self._epoch = 0

    @classmethod
    def problem(cls) -> str:
        """Nobody is logged in, and the mode is not one without a server."""
        if os.environ.get("WANDB_MODE") in _WITHOUT_LOGIN:
            return ""
        wandb: Any = import_module("wandb")

        if wandb.setup().settings.mode in _WITHOUT_LOGIN:
            return ""
        try:
            # It says on stderr where it has found a key.
            with redirect_stderr(io.StringIO()):
                found = wandb.login(prompt=False, verify=False)
        except wandb.errors.AuthenticationError as error:
            return f"{error}: log in with `wandb login`, or set WANDB_MODE=offline"
        if found:
            return ""
        return "nobody is logged in: log in with `wandb login`, or set WANDB_MODE=offline"

    def start(self, run: TrackedRun, kept: Kept | None, rows: int) -> Started:
        """Begin a run of W&B, or continue the one of this id."""
        wandb: Any = import_module("wandb")

        id = kept.id if kept else uuid.uuid4().hex[:12]
        limits: dict[str, Any] = {}
        if "WANDB_FINISH_TIMEOUT" not in os.environ:
            limits["finish_timeout"] = _FINISH_S
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=id,
            name=run.name,
            group=os.environ.get("WANDB_RUN_GROUP", run.group),
            job_type=run.stage,
            config=dict(run.config),
            allow_val_change=True,
            # Absolute: wandb's own process writes there, which has the working folder of its start.
            dir=os.path.abspath(os.environ.get("WANDB_DIR", run.folder)),
            # wandb itself reads it once, when it is first used in a process.
            mode=os.environ.get("WANDB_MODE"),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, **limits),
        )
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")
        self._epoch = kept.rows if kept else 0
        if self._run.disabled:
            return Started(id, "", self._epoch)
        if self._run.offline:
            folder = Path(self._run.settings.wandb_dir)
            written = last_epoch(folder, id) if kept and kept.open else None
            if written is not None:
                self._epoch = min(self._epoch, written)
            send = f"wandb sync {quote(str(_near(folder)))}/offline-run-*-{id}"
            return Started(id, str(folder), self._epoch, f"offline; to send this run: {send}")
        if self._run.resumed:
            # The server knows better than this folder: steps are epochs.
            self._epoch = max(0, self._run.step - 1)
        return Started(id, self._run.url, self._epoch, self._run.url)

    def row(self, row: Mapping[str, Any]) -> None:
        """Log one row; its step is its epoch, of which the server takes each once."""
        self._epoch = row["epoch"]
        self._run.log(scalars(row) | {"epoch": self._epoch}, step=self._epoch, commit=True)

    def finish(
        self,
        summary: Mapping[str, Any],
        files: Sequence[Path],
        table: Sequence[Mapping[str, Any]],
    ) -> None:
        """Log pictures and table one step behind the last epoch, whose step is complete."""
        wandb: Any = import_module("wandb")

        closing: dict[str, Any] = {file.stem: wandb.Image(str(file)) for file in files}
        if table:
            titles, cells = as_columns(table)
            closing["table"] = wandb.Table(columns=titles, data=cells)
        if closing:
            self._run.log(closing, step=self._epoch + 1, commit=True)
        self._run.summary.update(final_numbers(summary))
        self._run.finish(exit_code=0)

    def close(self, ending: Ending) -> None:
        """End it as failed or killed; one that has failed itself would only wait once more."""
        if self._run is not None and ending != "broken":
            self._run.finish(exit_code=_EXIT_CODES[ending])


def _near(folder: Path) -> Path:
    """Relative to the working folder, if it lies below."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
