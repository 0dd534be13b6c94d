"""One run of a sweep as a process of its own: what every launcher starts, on whichever host.

The process is `fastkd train --config RECIPE --resume auto`: a run that was stopped, or whose host
died, resumes. Other hosts import this module, so nothing here loads torch.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fastkd import __version__
from fastkd.errors import UserError

__all__ = ["End", "Order", "RunProcess", "refusal", "run_to_end"]

_LOOK_AGAIN_S = 0.2


class End(NamedTuple):
    """How a run ended."""

    code: int
    """Exit code of its process, or minus the number of the signal that killed it."""
    said: str
    """Last line of its output."""


@dataclass(frozen=True)
class Order:
    """What a host must know of a run to start it; it travels as a pickle."""

    title: str
    """For the lists of an engine."""
    recipe: str
    """YAML, with absolute paths."""
    root: Path
    """Of the run folders, absolute."""
    log: Path
    token: Path
    """A file that only those see who see the folder of this sweep."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of the environment, beside those of the host."""
    version: str = __version__
    sender: str = field(default_factory=socket.gethostname)


def refusal(order: Order) -> str:
    """Why this host cannot run it, in one sentence; empty if it can."""
    host = socket.gethostname()
    if order.version != __version__:
        return (
            f"{host} has fastkd {__version__} and {order.sender}, where the sweep was started, "
            f"{order.version}: install the same on all hosts"
        )
    if not order.token.exists():
        return (
            f"{host} does not see the run folders of {order.sender}, {order.root}: start the sweep "
            f"in a folder on storage that all hosts share"
        )
    return ""


def _environment() -> dict[str, str]:
    """That of this process, without its service of W&B.

    A run that is killed would stay open there, and could not be resumed.
    """
    return {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}


class RunProcess:
    """The process of one run. As a context manager it stops the run where the block is left early.

    It ends with the thread that started it (`bound`).
    """

    def __init__(self, order: Order, variables: Mapping[str, str] | None = None) -> None:
        train = ["-m", "fastkd.train", "--config", "/dev/stdin", "--resume", "auto"]
        bound = ["-m", "fastkd.runs.sweep.bound", str(os.getpid())]
        with tempfile.TemporaryFile() as recipe, order.log.open("ab") as log:
            recipe.write(order.recipe.encode())
            recipe.flush()
            self._log, self._start = order.log, log.tell()
            self._process = subprocess.Popen(
                [sys.executable, *bound, *train],
                cwd=order.root.parent,
                env=_environment() | dict(order.variables) | dict(variables or {}),
                stdin=recipe,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C on the terminal reaches the sweep only, which passes it on once.
                start_new_session=True,
            )

    def __enter__(self) -> "RunProcess":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self.wait()

    def end(self) -> End | None:
        """How it ended; None while it is under way."""
        code = self._process.poll()
        return None if code is None else End(code, self._last_line())

    def until_end(self) -> End:
        """Wait in a loop: an exception that Ray raises here would not interrupt a system call."""
        while (end := self.end()) is None:
            time.sleep(_LOOK_AGAIN_S)
        return end

    def stop(self) -> None:
        """Let it save its state and end, as with Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def wait(self) -> None:
        """Return when it has ended.

        Also for a signal handler, which may have interrupted `end`: takes no lock, and leaves the
        exit code to it.
        """
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)

    def _last_line(self) -> str:
        with self._log.open("rb") as log:
            log.seek(self._start)
            lines = log.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def run_to_end(order: Order) -> End:
    """Run it on this host; an exception from outside, such as KeyboardInterrupt, stops it first."""
    if why := refusal(order):
        return End(UserError.exit_code, why)
    with RunProcess(order) as run:
        return run.until_end()
