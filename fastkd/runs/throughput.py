"""Images a second of a recipe's loader, of its training step, and of both: `fastkd bench data`.

Nothing is written. A teacher that the recipe would train first takes part untrained: it takes the
same time.
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count as forever
from itertools import islice, repeat
from typing import Any

import numpy as np

from fastkd.data import DataPair
from fastkd.data.batch import Batch
from fastkd.data.picture_views import PictureView
from fastkd.data.sources.folder import FolderIndex
from fastkd.errors import UserError
from fastkd.recipe.schema import Recipe
from fastkd.runs.stages import Session, build_stage, open_recipe_data
from fastkd.teachers.loading import load_teacher
from fastkd.training.ahead import run_ahead
from fastkd.training.step import Prepared
from fastkd.training.trainer import Trainer
from fastkd.training.trial import errors_as_sentences

__all__ = ["measure_throughput"]

_WARM_UP = 2
"""Steps before the clock starts: the first ones compile, and start workers."""
_LOOKS = 16
_NEAR = 1.1
"""A loader that is faster than the step by less than this makes it wait now and then."""


@errors_as_sentences()
def measure_throughput(recipe: Recipe, session: Session, seconds: float) -> dict[str, Any]:
    """Rates of this rank, in images a second, and what limits them.

    seconds: how long each of the three is measured.
    """
    data = open_recipe_data(recipe, session)
    teachers = load_teacher(recipe.teacher, data)
    trainer = build_stage(recipe, data, teachers, session)
    # At the full size of the images, also where epochs have smaller ones.
    trainer = replace(trainer, views=replace(trainer.views, sizes=()))
    trainer.runner.train()
    loader = _rate(trainer, _loaded(trainer), seconds)
    first = next(trainer.loader.epoch(0))
    repeated = _Repeated(first, trainer.loader.steps_per_epoch)
    step = _rate(trainer, _trained(replace(trainer, loader=repeated)), seconds)
    both = _rate(trainer, _trained(trainer), seconds)
    return {
        "recipe": recipe.name,
        "backend": data.backend,
        "workers": recipe.data.workers,
        "batch_size": recipe.batch_size,
        "device": str(session.world.device),
        "ranks": session.world.size,
        "loader_images_per_s": loader,
        "step_images_per_s": step,
        "both_images_per_s": both,
        "waits": max(0.0, 1.0 - both / step),
        "limit": _limit(loader, step, recipe, data, session),
    }


def _rate(trainer: Trainer, batches: Iterator[int], seconds: float) -> float:
    """Images a second over at least one batch, after the warm-up."""
    for _ in islice(batches, _WARM_UP):
        pass
    trainer.totals_M.tolist()  # waits for the device
    images, start = 0, time.perf_counter()
    for num in batches:
        images += num
        if time.perf_counter() - start >= seconds:
            break
    trainer.totals_M.tolist()
    return images / (time.perf_counter() - start)


def _loaded(trainer: Trainer) -> Iterator[int]:
    for epoch in forever():
        for batch in trainer.loader.epoch(epoch):
            yield _rows(batch)


@dataclass(frozen=True)
class _Repeated:
    """A loader of one batch, over and over."""

    batch: Batch
    steps_per_epoch: int

    @property
    def batch_rows(self) -> tuple[int, ...]:
        return (_rows(self.batch),)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        return repeat(self.batch, self.steps_per_epoch - start_step)

    @property
    def is_planned(self) -> bool:
        return True

    def with_views(self, views: PictureView) -> "_Repeated":
        return self


def _trained(trainer: Trainer) -> Iterator[int]:
    for epoch in forever():
        batches: Iterator[Prepared] = run_ahead(trainer.prepare(epoch), trainer.world.device)
        for prepared in batches:
            trainer.optimize(prepared, epoch, 0)
            yield _rows(prepared.batch)


def _rows(batch: Batch) -> int:
    return len(batch.labels_N)


def _limit(
    loader: float, step: float, recipe: Recipe, data: DataPair, session: Session
) -> list[str]:
    """What is slower, and what would help: a sentence each."""
    on_cpu = session.world.device.type == "cpu"
    shared = ["loader and step share the cores of this machine"] if on_cpu else []
    if loader >= _NEAR * step:
        return ["the step: the loader keeps up with it", *shared]
    cores = len(os.sched_getaffinity(0))
    limit = ["the loader: it is slower than the step, or hardly faster", *shared]
    if data.backend == "resident":
        return limit
    workers = recipe.data.workers
    if workers < cores:
        limit.append(f"data.workers={cores} would use all cores (now {workers})")
    if data.backend == "torch" and data.facts.label_kind != "pixel":
        limit.append("data.backend=dali decodes faster: on a GPU, or in threads of the CPU")
    source = data.sources[0]
    if isinstance(source, FolderIndex):
        side = _short_side(source)
        enough = round(data.facts.image_shape[1] * 256 / 224)
        if side > 1.5 * enough:
            limit.append(
                f"the pictures have {side} pixels on their short side, and {enough} are enough: "
                f"`fastkd data pack {recipe.data.root} --out SHARDS --shrink {enough}` once"
            )
    return limit


def _short_side(source: FolderIndex) -> int:
    chosen = np.linspace(0, len(source) - 1, _LOOKS).astype(int)
    sides: list[int] = []
    for sample in chosen.tolist():
        with suppress(UserError):  # bad files are no matter of this
            sides.append(source.read(sample, lambda image: min(image.size)))
    return int(np.median(sides or [0]))
