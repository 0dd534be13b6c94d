"""Ctrl-C and SIGTERM: asked for at any moment, answered by the trainer between two steps."""

import signal
from types import FrameType
from typing import Any

import torch

from fastkd.distributed import World, all_reduce_sum

__all__ = ["StopSignal"]


class StopSignal:
    """Ctrl-C and SIGTERM become a flag that the loop reads between steps; a second one is final."""

    def __init__(self) -> None:
        self.code = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
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
        signal.signal(number, self._before[number])

    def agreed(self, world: World) -> bool:
        """True on all ranks, with the same `code`, as soon as one of them was asked to stop."""
        if world.size > 1:
            codes = (128 + signal.SIGINT, 128 + signal.SIGTERM)
            asked = torch.tensor([self.code == code for code in codes], device=world.device).int()
            votes = all_reduce_sum(asked).tolist()
            self.code = max((c for c, num in zip(codes, votes, strict=True) if num), default=0)
        return bool(self.code)
