"""The arguments of `build_trainer`: images and labels, how to train, where results go."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastkd.augment.config import PickConfig
from fastkd.augment.mix import NOT_MIXED, Mixing
from fastkd.augment.views import XPrime
from fastkd.compute.compiling import CompileChoice, CompileReason
from fastkd.data.batch import TrainLoader
from fastkd.data.facts import Facts
from fastkd.evaluation.evaluate import EvalLoader
from fastkd.models.intake import Remedy
from fastkd.output.console import Console
from fastkd.output.run_folder import RunFolder
from fastkd.training.config import OptimConfig, RecordName

__all__ = ["Output", "Remedies", "TrainData", "TrainingSettings"]


@dataclass(frozen=True, kw_only=True)
class Remedies:
    """What the user changes if a network or loss refuses the batches: ends of sentences."""

    called: str = "the student"
    """What is trained, for messages."""
    student: Remedy = field(default_factory=Remedy)
    last_batch: str = "leave out the last batch, or choose another batch size"
    every_batch: str = "choose a larger batch size"
    one_class: str = "add images of another class"


@dataclass(frozen=True)
class TrainData:
    """What is trained and evaluated on, this rank's share."""

    loader: TrainLoader
    val_loader: EvalLoader | None
    """None without labels to evaluate on: the last epoch is then kept as the best."""
    facts: Facts
    images: int
    """Training images of one epoch, all ranks together; decides whether compiling pays."""
    remedies: Remedies = field(default_factory=Remedies)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to train, besides what the loop's `Plan` says."""

    optim: OptimConfig
    """Milestones and warm-up are in epochs of this run."""
    xprime: XPrime = "none"
    """The second view of every batch."""
    mixing: Mixing = NOT_MIXED
    """How x is mixed."""
    sizes: tuple[int, ...] = ()
    """Sides of the training images in equal parts of the run; (): their own."""
    pick: PickConfig | None = None
    """Choose x' from a pool of them."""
    ema: float | None = None
    """Decay of an average of the student, which is then evaluated and kept."""
    sync_bn: bool = False
    """Batch statistics over all ranks."""
    max_skips: int = 10
    """Consecutive bad steps before the run is given up."""
    compile: CompileChoice = "auto"
    """torch.compile; auto: if the run is long enough to pay for it."""
    compile_reason: CompileReason = "key"
    """Who has settled `compile`, unless it is auto."""
    fullgraph: bool = True
    """False allows graph breaks, for users' own networks."""

    @property
    def pool(self) -> int:
        """How many x' are made per image of the batch."""
        return self.pick.pool if self.pick else 1


@dataclass(frozen=True)
class Output:
    """Where results go."""

    folder: RunFolder | None = None
    """None writes nothing."""
    console: Console = field(default_factory=lambda: Console(enabled=False))
    on_epoch: Callable[[dict[str, Any]], object] | None = None
    """Called on rank 0 with a copy of every epoch's row."""
    record: tuple[RecordName, ...] = ()
    """What the folder's record/ keeps for figures."""
