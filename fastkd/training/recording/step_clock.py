"""`report.record=time`: where the time of a step goes, by the host's clock.

The rule: in the last steps of an epoch (`LAST_STEPS`) the host waits for the device before and
after each part, so parts that usually overlap, such as the teacher of the next batch on a GPU, are
timed one after the other. Data is the exception: what the loop waited for batches in all steps of
the epoch, divided by these, without any extra wait. In all other steps nothing waits and nothing is
timed.

    data        waiting for the loader              (Trainer.prepare)
    views       mixing, second views                (Trainer.prepared)
    teacher     its answers, or reading them        (Trainer.prepared)
    pick        scoring the pool                    (Update._computed)
    student     its forward passes                  (Update._backward)
    losses      the rest of the forward pass        (Update._backward)
    forward     both, where they are compiled into one graph
    backward    gradients; on several ranks with their sum
    optimizer   judging the step, update, average, memory banks
"""

import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import override

from fastkd.training.config import RecordName
from fastkd.training.recording.recording import Recording, Row
from fastkd.training.step import Prepared

__all__ = ["PARTS", "StepClock", "StepTimes"]

PARTS = (
    "data",
    "views",
    "teacher",
    "pick",
    "student",
    "losses",
    "forward",
    "backward",
    "optimizer",
)
"""In the order of a step."""


class StepClock:
    """Times the parts of some steps; without `first` none, at the price of one comparison each."""

    def __init__(self, device: torch.device, first: int | None = None) -> None:
        """first: the first timed step of every epoch; None: no step is timed."""
        self.device, self.first = device, first
        self._step: int | None = None
        self._seconds: dict[str, float] = {}
        self._steps: dict[str, set[int]] = {}

    def turn(self, step: int) -> None:
        """What follows belongs to this step of the epoch."""
        timed = self.first is not None and step >= self.first
        self._step = step if timed else None

    def part(self, name: str) -> AbstractContextManager[None]:
        """A part of the step, timed if its step is."""
        return nullcontext() if self._step is None else self._timed(name)

    @contextmanager
    def _timed(self, name: str) -> Generator[None]:
        began = self._now()
        yield
        self._add(name, self._now() - began)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _add(self, name: str, seconds: float) -> None:
        if self._step is None:
            return
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        self._steps.setdefault(name, set()).add(self._step)

    def watch(self, module: nn.Module, name: str) -> None:
        """Time every forward pass of a module as a part of its own."""
        began: list[float] = []

        def before(*_: Any) -> None:
            if self._step is not None:
                began.append(self._now())

        def after(*_: Any) -> None:
            if began:
                self._add(name, self._now() - began.pop())

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def per_step_ms(self) -> dict[str, float]:
        """Milliseconds per timed step of each part since the last call."""
        found = {
            name: 1e3 * self._seconds[name] / len(self._steps[name])
            for name in PARTS
            if name in self._seconds
        }
        self._seconds, self._steps = {}, {}
        return found


class StepTimes(Recording):
    """What the clock of a trainer has measured at the end of an epoch, on rank 0."""

    name: ClassVar[RecordName] = "time"

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self.timed = 0

    @override
    def before_update(self, prepared: Prepared) -> None:
        self.timed += 1

    @override
    def of_epoch(self, epoch: int, last: Prepared, wait_ms: float) -> Row:
        parts = self.clock.per_step_ms()
        if "student" in parts:
            parts["losses"] = max(parts.pop("forward") - parts["student"], 0.0)
        timed, self.timed = self.timed, 0
        parts = {"data": wait_ms} | parts
        return {"steps": timed} | {f"{one}_ms": parts[one] for one in PARTS if one in parts}
