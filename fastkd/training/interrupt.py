"""Ctrl-C, SIGTERM and a closed terminal: received at any moment, handled between two steps."""

import os
import signal
import stat
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

import torch

from fastkd.compute.collectives import all_reduce_sum
from fastkd.compute.ranks import World

__all__ = ["StopSignal"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME_WISH_S = 1.0
_ACTIVE: "list[StopSignal]" = []
"""Those that receive signals; the last one does."""
_BEFORE: dict[int, Any] = {}
"""Handlers from before the first of them."""


class StopSignal:
    """The signals become a flag that the loop reads between steps; a second one is final.

    Signals within a second count as one: torchrun forwards what the terminal has already sent to
    all its processes, and a closing terminal sends its own signal and its shell's.
    SIGHUP comes when the terminal is closed; under `nohup` the run continues, as it should.
    """

    def __init__(self) -> None:
        self.code = 0
        self._asked_at = 0.0

    def __enter__(self) -> "StopSignal":
        # Elsewhere Python does not let anybody receive signals: the caller keeps its own handling.
        if threading.current_thread() is threading.main_thread():
            if not _ACTIVE:
                handlers = {int(number): signal.getsignal(number) for number in _SIGNALS}
                if handlers[signal.SIGHUP] is signal.SIG_IGN:
                    del handlers[signal.SIGHUP]
                _BEFORE.update(handlers)
            _ACTIVE.append(self)
            self._install()
        return self

    def __exit__(self, *exc: object) -> None:
        """The handlers go to the one that entered before, or as they were to whoever set them.

        In any order: a training that nobody ended is left when Python collects it.
        """
        if self not in _ACTIVE:
            return
        _ACTIVE.remove(self)
        with suppress(ValueError):  # collected in another thread
            if _ACTIVE:
                _ACTIVE[-1]._install()
                return
            for number, handler in _BEFORE.items():
                signal.signal(number, handler)
        _BEFORE.clear()

    def _install(self) -> None:
        for number in _BEFORE:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.code and now - self._asked_at > _SAME_WISH_S and number != signal.SIGHUP:
            signal.signal(number, _BEFORE[number])
            signal.raise_signal(number)
            return
        if not self.code:
            self.code, self._asked_at = 128 + number, now
        if number == signal.SIGHUP:
            _leave_terminal()

    def agreed(self, world: World) -> bool:
        """True on all ranks, with the same `code`, as soon as one of them was asked to stop."""
        if world.size == 1:
            return bool(self.code)
        codes = [128 + number for number in _SIGNALS]
        asked = torch.tensor([self.code == code for code in codes], device=world.device).int()
        votes = all_reduce_sum(asked).tolist()
        decided = max((c for c, num in zip(codes, votes, strict=True) if num), default=0)
        # A signal that came during the vote stays for the next one.
        if decided:
            # Stopped by another rank, this one may still receive its own signal.
            self._asked_at = self._asked_at if self.code else time.monotonic()
            self.code = decided
        return bool(decided)


def _leave_terminal() -> None:
    """Discard further output: a write to a closed terminal is an error."""
    for fd in (1, 2):
        # If a daemon has closed it, there is nothing to replace; isatty would already fail.
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(fd).st_mode):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, fd)
                os.close(nowhere)
