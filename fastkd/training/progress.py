"""The plan of a run, and its progress."""

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Plan", "Position", "Progress"]

Position = tuple[int, int]
"""Epochs done, and steps done in the next one."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the loop itself needs from a recipe."""

    stage: str
    """Name of the training, for messages."""
    digest: str
    """Identifies the outcome: a checkpoint with another digest is not resumed."""
    seed: int
    """Of weights and dropout."""
    data_seed: int | None = None
    """Of how images are mixed, as of the loader; None: `seed`."""
    epochs: int
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    save_steps: int | None = None
    """Save every N steps, in addition to after every epoch."""
    eval_epochs: int = 1
    """Evaluate every N epochs, and after the last."""
    epoch_factor: float = 1.0
    """The recipe's factor on its epochs; it also stretches the losses' schedules."""
    cycle: int | None = None
    """Epochs after which the views come again; None: never."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Written to best.safetensors."""

    def shown_epoch(self, epoch: int) -> int:
        """The epoch whose views are shown in `epoch`; nothing but the views follows from it."""
        return epoch if self.cycle is None else epoch % self.cycle


@dataclass
class Progress:
    """The progress of a run, with `best` in the headline metric; saved with every checkpoint."""

    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Steps done in this epoch."""
    best: float = -1.0
    best_epoch: int = 0
    """Counted from 1, as in the metrics."""
    rows: int = 0
    """Read by nobody, but every last.pt has it, and a part is restored only with all its keys."""
    epoch_s: float = 0.0
    """Seconds spent on this epoch's steps."""
    wait_s: float = 0.0
    """Seconds of these in which the loop waited for data."""

    @property
    def position(self) -> Position:
        """Where the run is."""
        return self.epoch, self.step

    def next_epoch(self) -> None:
        """One epoch done, its row written."""
        self.epoch += 1
        self.step = 0
        self.epoch_s = self.wait_s = 0.0

    def state_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's progress."""
        for name, value in asdict(Progress(**state)).items():
            setattr(self, name, value)
