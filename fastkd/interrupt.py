"""Ctrl-C, SIGTERM and a closed terminal: asked for at any moment, answered between two steps."""

import os
import signal
import stat
from types import FrameType
from typing import Any

import torch

from fastkd.distributed import World, all_reduce_sum

__all__ = ["StopSignal"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal:
    """The signals become a flag that the loop reads between steps; a second one is final.

    SIGHUP comes when the terminal is closed; under `nohup` the run outlives that, as it should.
    """

    def __init__(self) -> None:
        self.code = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in _SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:
                break  # not the main thread: the caller keeps its own handling
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.code = 128 + number
        if number == signal.SIGHUP:
            # A closing terminal tells twice, by its shell and by itself: that is no second wish.
            signal.signal(number, signal.SIG_IGN)
            _leave_terminal()
        else:
            signal.signal(number, self._before[number])

    def agreed(self, world: World) -> bool:
        """True on all ranks, with the same `code`, as soon as one of them was asked to stop."""
        if world.size > 1:
            codes = [128 + number for number in _SIGNALS]
            asked = torch.tensor([self.code == code for code in codes], device=world.device).int()
            votes = all_reduce_sum(asked).tolist()
            self.code = max((c for c, num in zip(codes, votes, strict=True) if num), default=0)
        return bool(self.code)


def _leave_terminal() -> None:
    """What is still said goes nowhere: a write to a closed terminal is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        # isatty would already say no.
        if stat.S_ISCHR(os.fstat(fd).st_mode):
            os.dup2(nowhere, fd)
    os.close(nowhere)
