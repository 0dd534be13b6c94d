"""Batches that several trainers of one process share: read, changed and shown to the teacher once.

Flow: the trainers take turns (`Trainer.training`), and each asks here for the batch of its next
step. The first that comes to a position has it prepared, the others take the same tensors. The
bits are those of a trainer alone: a batch is a function of the data, the seed, its position and
what `_kind` compares.
"""

import time
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor

from fastkd.data.batch import Batch
from fastkd.losses.base.needs import Need
from fastkd.teachers.cache.cached import CachedTeacher
from fastkd.training.progress import Position
from fastkd.training.step import Prepared
from fastkd.training.trainer import Trainer

__all__ = ["SharedBatches"]

_KEPT = {"cpu": 1, "cuda": 2}  # on a GPU the next batch is prepared during a step


class SharedBatches:
    """Callable: a trainer and an epoch -> its batches, as `Trainer.prepare` would make them.

    For trainers on the same data, with the same seed of their order. Those whose views, teacher or
    compiler differ get batches of their own.
    """

    def __init__(self) -> None:
        self._streams: dict[Hashable, _Stream] = {}

    def __call__(self, trainer: Trainer, epoch: int) -> Iterator[Prepared]:
        """The batches from where the trainer is to the end. epoch: whose views are shown."""
        for step in range(trainer.progress.step, trainer.loader.steps_per_epoch):
            yield self._prepared(trainer, (epoch, step))

    def _prepared(self, trainer: Trainer, at: Position) -> Prepared:
        made = self._stream(trainer).kept.get(at)
        if made is None or not made.is_intact():
            made = self._stream(trainer).make(trainer, at)
            # Looked up again: a trainer whose teacher does not compile is now of another kind.
            self._stream(trainer).keep(made, at, _KEPT[trainer.world.device.type])
        trainer.received(made.prepared.batch, made.wait_s)
        return made.of(trainer, at)

    def _stream(self, trainer: Trainer) -> "_Stream":
        return self._streams.setdefault(_kind(trainer), _Stream())


def _kind(trainer: Trainer) -> Hashable:
    """Equal for trainers whose batches are the same."""
    views = trainer.views
    # What is mixed besides the pixels is up to each; `epochs` decide the sizes of the images only.
    views = replace(views, mixes=(), epochs=views.epochs if views.sizes else 1)
    teacher: Hashable = trainer.teacher
    if isinstance(trainer.teacher, CachedTeacher):
        # Each trainer has its own, which reads what the others have written.
        teacher = trainer.teacher.store.folder, trainer.teacher.store.needs
    return views, teacher, trainer.decisions["compile"]


@dataclass(eq=False)
class _Made:
    """A prepared batch, and what its tensors were then."""

    prepared: Prepared
    wait_s: float
    versions: list[tuple[Tensor, int]] = field(default_factory=list[tuple[Tensor, int]])

    def __post_init__(self) -> None:
        batch = self.prepared.batch
        self._note(batch.images_NCHW, batch.labels_N, batch.index_N)
        self._note(*self.prepared.views.values(), *self.prepared.targets.values())

    def _note(self, *tensors: Tensor) -> None:
        self.versions += [(one, one._version) for one in tensors]

    def is_intact(self) -> bool:
        """Whether no student has written into its images, as an in-place first layer would."""
        return all(one._version == version for one, version in self.versions)

    def of(self, trainer: Trainer, at: Position) -> Prepared:
        """With those mixed targets that the trainer's losses need."""
        targets = self.prepared.targets
        wanted = {str(Need.of("xprime", "mixed", tap)): tap for tap in trainer.views.mixes}
        if lacking := [tap for need, tap in wanted.items() if need not in targets]:
            views = replace(trainer.views, mixes=lacking)
            more = views.xprime_targets(self.prepared.batch, targets, *at)
            targets.update(more)
            self._note(*more.values())
        kept = [need for need in targets if Need(need).net != "mixed"]
        return self.prepared._replace(targets={need: targets[need] for need in (*kept, *wanted)})


class _Stream:
    """The batches of one kind of trainers, in the order in which they are asked for."""

    def __init__(self) -> None:
        self.kept: dict[Position, _Made] = {}
        self._batches: Iterator[Batch] = iter(())
        self._next: Position | None = None

    def make(self, trainer: Trainer, at: Position) -> _Made:
        """Prepare the batch of a position, by the trainer that asks for it."""
        if at != self._next:
            self._batches = trainer.loader.epoch(*at)
        epoch, step = at
        clock = time.perf_counter()
        batch = next(self._batches)
        wait_s = time.perf_counter() - clock
        self._next = epoch, step + 1
        return _Made(trainer.prepared(batch, *at), wait_s)

    def keep(self, made: _Made, at: Position, num: int) -> None:
        """For the next trainers, in place of older ones."""
        self.kept.pop(at, None)
        self.kept[at] = made
        for old in list(self.kept)[:-num]:
            del self.kept[old]
