"""The recordings of one training, and what each of them needs of it.

The trainer calls a `Recorder` before the last steps of an epoch and at its end. Where a recording
cannot be made, `build_recorder` says so before anything is trained.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastkd.augment.config import PickConfig
from fastkd.augment.views import ViewMaker
from fastkd.compute.placement import Placement
from fastkd.data.facts import Facts
from fastkd.errors import UserError
from fastkd.losses.base.term import LossTerm
from fastkd.models.taps import ZooNetwork
from fastkd.output.run_folder import RunFolder
from fastkd.teachers.teacher import Teacher
from fastkd.teachers.teaching import Teaching
from fastkd.training.config import RecordName
from fastkd.training.progress import Plan, Progress
from fastkd.training.recording.alignment import Alignment, stages_in_common
from fastkd.training.recording.divergence import Divergence
from fastkd.training.recording.recording import LAST_STEPS, Recording
from fastkd.training.recording.samples import Samples
from fastkd.training.recording.step_clock import StepClock, StepTimes
from fastkd.training.recording.weights import Weights
from fastkd.training.step import DistillStep, Prepared, needed_taps

__all__ = ["Recorded", "Recorder", "build_recorder"]


class Recorder:
    """What `report.record` names, of one training."""

    def __init__(self, recordings: Sequence[Recording], clock: StepClock, steps: int) -> None:
        """steps: of an epoch."""
        self.recordings = tuple(recordings)
        self.clock = clock
        self.steps = steps
        self._last: Prepared | None = None

    def before_training(self, folder: RunFolder | None) -> None:
        """Before the first step of the run. folder: of the rank that writes, None on the others."""
        for one in self.recordings:
            row = one.before_training()
            if folder is not None and row is not None:
                folder.append_record(one.name, {"epoch": 0} | row)

    def before_update(self, prepared: Prepared, step: int) -> None:
        """Before the update of a step of the epoch, on all ranks."""
        if step < self.steps - LAST_STEPS:
            return
        for one in self.recordings:
            one.before_update(prepared)
        if step == self.steps - 1:
            self._last = prepared

    def end_epoch(self, progress: Progress, folder: RunFolder | None) -> None:
        """Write what is kept of the epoch that just ended, on all ranks."""
        last, self._last = self._last, None
        if last is None:  # a loader that yields fewer batches than it says
            return
        wait_ms = 1e3 * progress.wait_s / max(progress.step, 1)
        for one in self.recordings:
            kept = one.of_epoch(progress.epoch + 1, last, wait_ms)
            if folder is None or kept is None:
                continue
            if one.in_arrays:
                folder.write_record(one.name, progress.epoch + 1, kept)
            else:
                folder.append_record(one.name, {"epoch": progress.epoch + 1} | dict(kept))


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The training that is recorded."""

    plan: Plan
    step: DistillStep
    compiled: bool
    teaching: Teaching
    facts: Facts
    views: ViewMaker
    pick: PickConfig | None
    placement: Placement
    layout: torch.memory_format
    """Of the images."""
    steps: int
    """Of an epoch."""

    @property
    def student(self) -> nn.Module:
        """The network that is trained."""
        return self.step.student.model

    def view(self, name: RecordName) -> str:
        """The view on which student and teacher are compared. UserError without one."""
        if self.facts.label_kind != "class":
            raise UserError(
                f"report.record={name} is for images of one class each, and these have other "
                f"labels: leave it out"
            )
        asked = needed_taps(self.terms, "teacher")
        for view in ("xprime", "x"):
            if view in self.step.views and "logits" in asked.get(view, ()):
                return view
        raise UserError(
            f"report.record={name} compares the logits of student and teacher, and no loss asks "
            f"the teacher for any: add losses.kd, or leave it out"
        )

    @property
    def terms(self) -> list[LossTerm]:
        """The losses."""
        return [term for term in self.step.terms if isinstance(term, LossTerm)]

    @property
    def temperature(self) -> float:
        """Of the pick by KL, else of the first loss that has one."""
        if self.pick is not None and self.pick.criterion == "kl":
            return self.pick.temperature
        found = [getattr(term, "temperature", None) for term in self.terms]
        return next((float(one) for one in found if isinstance(one, int | float)), 1.0)


def _weights(of: Recorded, clock: StepClock) -> Recording:
    return Weights(of.student)


def _divergence(of: Recorded, clock: StepClock) -> Recording:
    return Divergence(
        of.student,
        view=of.view("kl"),
        temperature=of.temperature,
        pick=of.pick,
        precision=of.placement.precision,
        world=of.placement.world,
    )


def _samples(of: Recorded, clock: StepClock) -> Recording:
    return Samples(
        of.student,
        view=of.view("samples"),
        views=of.views,
        normalization=of.facts.normalization,
        plan=of.plan,
        steps=of.steps,
    )


def _alignment(of: Recorded, clock: StepClock) -> Recording:
    nets = of.teaching.nets
    if len(nets) != 1:
        raise UserError(
            f"report.record=alignment compares the stages of student and teacher, and there are "
            f"{len(nets)} teachers: leave it out"
            if nets
            else "report.record=alignment runs the teacher, whose answers come from teacher.cache: "
            "leave one of them out"
        )
    stages = stages_in_common(of.student, nets[0].model)
    assert isinstance(of.student, ZooNetwork)
    teacher = Teacher(
        nets[0],
        {"x": stages},
        of.placement,
        data_normalization=of.facts.normalization,
        layout=of.layout,
        fold_batch_norm=False,
    )
    return Alignment(of.student, teacher, of.facts.image_shape, of.placement)


def _time(of: Recorded, clock: StepClock) -> Recording:
    return StepTimes(clock)


_MAKERS: Mapping[RecordName, Callable[[Recorded, StepClock], Recording]] = {
    "weights": _weights,
    "kl": _divergence,
    "samples": _samples,
    "alignment": _alignment,
    "time": _time,
}


def build_recorder(names: Sequence[RecordName], of: Recorded) -> Recorder | None:
    """The recorder of a training; None if it records nothing.

    Raises:
        UserError: it cannot be recorded.
    """
    if not names:
        return None
    first = max(of.steps - LAST_STEPS, 0) if "time" in names else None
    clock = StepClock(of.placement.device, first)
    if first is not None and not of.compiled:
        # A compiled step is one graph, in which no clock can be read.
        clock.watch(of.step.student, "student")
    return Recorder([_MAKERS[name](of, clock) for name in names], clock, of.steps)
