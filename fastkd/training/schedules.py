"""Learning rate and momentum as pure functions of the optimizer step.

Flow: recipe -> `Schedule` -> `update.Update`, which calls
`set_lr(optimizer, schedule.lr_factor(step))` before each optimizer step. There is no state, so a
resumed run cannot disagree with an uninterrupted one.

Steps count from 0 and so do epochs, as in the losses' own schedules
(`fastkd.losses.base.schedules`): steps 0 to steps_per_epoch - 1 are epoch 0. All kinds return a
factor of the base learning rate:

    constant     1
    multistep    gamma ** (number of milestones passed); for whole epochs `MultiStepLR` stepped per
                 epoch, a milestone within an epoch falls on its nearest step
    exponential  gamma ** epoch; `ExponentialLR` stepped per epoch
    cosine       (1 + cos(pi * s / S)) / 2; `CosineAnnealingLR` stepped per step
    poly         (1 - epoch / epochs) ** power; `PolynomialLR` stepped per epoch. ERFNet's released
                 code has a power of 0.9
    onecycle     `OneCycleLR` with its defaults: cosine, pct_start 0.3, 25, 1e4, and a momentum of
                 0.95 - 0.85 - 0.95

Linear warm-up (all kinds but the last) multiplies step s of W by (s + 1) / W; the cosine then spans
the S - W steps that follow it, while the milestones stay absolute epochs.
"""

import math
from dataclasses import dataclass
from typing import get_args

from fastkd.errors import UserError
from fastkd.training.config import OptimConfig, ScheduleKind

__all__ = ["Schedule"]

# The defaults of torch.optim.lr_scheduler.OneCycleLR (Smith and Topin 2017, arXiv:1708.07120).
_ONECYCLE_RISING_SHARE = 0.3
_ONECYCLE_START = 1 / 25
_ONECYCLE_END = _ONECYCLE_START / 1e4
_ONECYCLE_MOMENTUM_HIGH, _ONECYCLE_MOMENTUM_LOW = 0.95, 0.85


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One schedule, bound to the length of its run.

    Raises:
        UserError: the kind is unknown, a length is not positive, the warm-up does not fit into the
            run, or a warm-up is asked of onecycle, which has its own.
    """

    kind: ScheduleKind = "constant"
    epochs: int
    """Length of the run in epochs."""
    steps_per_epoch: int
    """Optimizer steps (not micro-batches) of one epoch."""
    milestones: tuple[float, ...] = ()
    """multistep: from the start of each of these epochs the rate is multiplied by gamma."""
    gamma: float = 0.1
    """multistep and exponential: the factor at each milestone, or after every epoch."""
    power: float = 0.9
    """poly: the exponent."""
    warmup_epochs: float = 0.0
    """Length of the linear warm-up in epochs, rounded to whole steps; 0 is none."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise UserError(
                f"the schedule {self.kind!r} is unknown; choose one of "
                + ", ".join(get_args(ScheduleKind))
            )
        if self.epochs < 1 or self.steps_per_epoch < 1:
            raise UserError(
                f"a schedule needs at least one epoch of one step, got {self.epochs} epochs of "
                f"{self.steps_per_epoch} steps; is the batch larger than the data set?"
            )
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise UserError(
                f"a warm-up of {self.warmup_epochs} epochs does not fit into {self.epochs} epochs"
            )
        if self.kind == "onecycle" and self.warmup_epochs > 0:
            raise UserError("the onecycle schedule has its own warm-up; set warmup_epochs to 0")

    @classmethod
    def from_config(cls, config: OptimConfig, *, epochs: int, steps_per_epoch: int) -> "Schedule":
        """The schedule of a recipe, its milestones and warm-up given in epochs of this run."""
        return cls(
            kind=config.schedule,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            milestones=config.milestones,
            gamma=config.gamma,
            power=config.power,
            warmup_epochs=config.warmup_epochs,
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def lr_factor(self, step: int) -> float:
        """Factor of the base learning rate for optimizer step `step`, counted from 0.

        The module docstring has the formulas; steps past the end of the run keep the last value.
        """
        step = min(step, self.total_steps - 1)
        if self.kind == "onecycle":
            return _onecycle(step, self.total_steps, _ONECYCLE_START, 1.0, _ONECYCLE_END)
        warmup_steps = round(self.warmup_epochs * self.steps_per_epoch)
        warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        epoch = step // self.steps_per_epoch
        if self.kind == "multistep":
            passed = (round(m * self.steps_per_epoch) <= step for m in self.milestones)
            return warmup * self.gamma ** sum(passed)
        if self.kind == "exponential":
            return warmup * self.gamma**epoch
        if self.kind == "poly":
            return warmup * (1 - epoch / self.epochs) ** self.power
        if self.kind == "cosine":
            if step < warmup_steps:
                return warmup
            progress = (step - warmup_steps) / (self.total_steps - warmup_steps)
            return _cosine(1.0, 0.0, progress)
        return warmup

    def momentum(self, step: int) -> float | None:
        """Momentum (Adam: beta1) for step `step`, or None if the schedule does not change it."""
        if self.kind != "onecycle":
            return None
        high, low = _ONECYCLE_MOMENTUM_HIGH, _ONECYCLE_MOMENTUM_LOW
        return _onecycle(min(step, self.total_steps - 1), self.total_steps, high, low, high)


def _onecycle(step: int, total_steps: int, start: float, peak: float, end: float) -> float:
    # torch puts the turning point on a fractional step, and at 3 steps or fewer before the first
    # one; kept, so that a schedule equals torch's at every length.
    turn = _ONECYCLE_RISING_SHARE * total_steps - 1
    if step <= turn:
        return _cosine(start, peak, step / turn)
    return _cosine(peak, end, (step - turn) / (total_steps - 1 - turn))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
