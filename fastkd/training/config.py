"""Recipe keys for the optimizer and its schedule."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from fastkd.config.section import Section, Since

__all__ = ["OptimConfig", "OptimizerImpl", "OptimizerName", "ScheduleKind"]

OptimizerName = Literal["sgd", "adam", "adamw", "lamb"]
OptimizerImpl = Literal["torch", "apex"]
ScheduleKind = Literal["constant", "multistep", "exponential", "cosine", "poly", "onecycle"]


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
