"""Recipe keys for the optimizer and its schedule, and for what a training records."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, field_validator

from fastkd.config.section import Section, Since

__all__ = [
    "BESIDE_A_TEACHER",
    "OptimConfig",
    "OptimizerImpl",
    "OptimizerName",
    "RecordName",
    "ReportConfig",
    "ScheduleKind",
]

OptimizerName = Literal["sgd", "adam", "adamw", "lamb"]
OptimizerImpl = Literal["torch", "apex"]
ScheduleKind = Literal["constant", "multistep", "exponential", "cosine", "poly", "onecycle"]
RecordName = Literal["weights", "kl", "samples", "alignment", "time"]
BESIDE_A_TEACHER: frozenset[RecordName] = frozenset(("kl", "samples", "alignment"))
"""Recordings that compare the student with its teacher."""


class OptimConfig(Section):
    """Optimizer and learning-rate schedule (`fastkd.training.optim`,
    `fastkd.training.schedules`)."""

    name: OptimizerName = "sgd"
    """Update rule."""
    impl: OptimizerImpl = "torch"
    """Which implementation."""
    lr: PositiveFloat = 0.05
    """Peak learning rate at the global batch size."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: NonNegativeFloat = 5e-4
    """Applied to every trained parameter, norms and biases included, as the papers do; by adamw
    apart from the gradient, by adam as a part of it."""
    decay_norms: bool = True
    """false: no weight decay on norms and biases (all one-dimensional), as in timm."""
    schedule: ScheduleKind = "multistep"
    """Shape of the learning rate over the run."""
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    """Where multistep decays: epochs, or shares of the run below 1 (150, 180, 210 of 240)."""
    gamma: PositiveFloat = 0.1
    """Factor at each milestone; exponential: after every epoch."""
    power: Annotated[PositiveFloat, Since("0.2")] = 0.9
    """Of poly: the rate falls as (1 - epoch / epochs) ** power, epoch by epoch."""
    warmup_epochs: NonNegativeFloat = 0
    """Length of the linear warm-up in epochs."""
    clip_norm: PositiveFloat | None = None
    """Largest global gradient norm."""


class ReportConfig(Section):
    """What a training keeps for figures of `fastkd report` (`fastkd.training.recording`)."""

    record: tuple[RecordName, ...] = ()
    """Recordings in the run's folder record/: weights, kl, samples, alignment, time."""

    @field_validator("record", mode="after")
    @classmethod
    def _each_once(cls, value: tuple[RecordName, ...]) -> tuple[RecordName, ...]:
        return tuple(dict.fromkeys(value))

    def alone(self) -> "ReportConfig":
        """What a training without a teacher can keep of it."""
        return ReportConfig(record=tuple(n for n in self.record if n not in BESIDE_A_TEACHER))

    def wrong_alone(self) -> str | None:
        """What a recipe without a teacher is told; None if it can keep all of it."""
        beside = [name for name in self.record if name in BESIDE_A_TEACHER]
        if not beside:
            return None
        return (
            f"report.record={beside[0]} compares the student with its teacher, and this recipe has "
            f"none: leave it out"
        )
