"""One training of a recipe, in a folder of its own that is resumed and reused.

Flow: `runs.stages` puts a whole recipe together from these: the teacher, the student alone, the
distilled student, and the encoder before each of them (`runs.encoders`).
"""

import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastkd.compute.placement import Placement
from fastkd.compute.precision import resolve_precision
from fastkd.compute.ranks import World, on_main
from fastkd.data import DataPair, open_data
from fastkd.data.loaders.dense_pair import strided
from fastkd.losses.base.registry import build_terms
from fastkd.models.registry import is_of_zoo
from fastkd.output.console import Console
from fastkd.output.occupancy import occupied, tidy
from fastkd.output.run_facts import facts_of_run
from fastkd.output.run_folder import RunFolder
from fastkd.recipe.parts import TEACHES
from fastkd.recipe.schema import Recipe
from fastkd.report.class_iou import with_class_names
from fastkd.runs.encoders import NOWHERE, Start, train_encoder
from fastkd.runs.folders import RunIdentity, stage_folder
from fastkd.runs.pictures import palette_of
from fastkd.storage.checkpoint import Checkpoint
from fastkd.storage.description import facts_of
from fastkd.teachers.cache.cached import CachedTeacher
from fastkd.teachers.cache.opening import AnswerCache
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.loading import load_net, of_images, size, start_of
from fastkd.teachers.teaching import Teaching
from fastkd.training.build import build_trainer
from fastkd.training.checkpointing import keep_plain, open_checkpoint
from fastkd.training.interrupt import StopSignal
from fastkd.training.progress import Plan, Position
from fastkd.training.settings import Output, Remedies, TrainData, TrainingSettings
from fastkd.training.trainer import Trainer
from fastkd.training.turns import to_its_end

__all__ = [
    "Session",
    "build_encoder_stage",
    "build_stage",
    "encoder_first",
    "facts_of_stage",
    "fit",
    "go_on",
    "identity_of",
    "open_recipe_data",
    "train_stage",
]


_OF_THE_FOLDER = ("data", "network", "palette")
"""Entries of summary.json that every stage of a run would repeat."""


@dataclass(frozen=True)
class Session:
    """What all stages of a run share."""

    world: World
    console: Console
    root: Path
    """Where run folders go unless `out` says otherwise."""

    def placement(self, recipe: Recipe) -> Placement:
        """Where and how a recipe of this session computes."""
        precision = resolve_precision(recipe.precision, self.world.device)
        networks = (recipe.student, *recipe.teachers().values())
        foreign = not all(is_of_zoo(one.name) for one in networks)
        return Placement(self.world, precision, recipe.channels_last, foreign)


def open_recipe_data(recipe: Recipe, session: Session) -> DataPair:
    """Both splits as the recipe describes them, this rank's share; says what they hold."""
    data = _open_data(recipe, session)
    # Images are opened for the remarks: only where somebody reads them.
    for remark in data.remarks if session.console.enabled else ():
        session.console.note(remark)
    return data


def _open_data(recipe: Recipe, session: Session) -> DataPair:
    return open_data(
        recipe.data,
        recipe.augment,
        batch_size=recipe.batch_size,
        seed=recipe.data_seed,
        placement=session.placement(recipe),
    )


def build_stage(
    recipe: Recipe,
    data: DataPair,
    teachers: tuple[LoadedNet, ...],
    session: Session,
    folder: RunFolder | None = None,
    checkpoint: Checkpoint | None = None,
    cache: AnswerCache | None = None,
    start: Start = NOWHERE,
) -> Trainer:
    """The recipe's own training, in a folder or without one.

    checkpoint: the checkpoint that the caller will resume. cache: of the teachers' answers. start:
    the encoder from which the student starts.
    """
    # Graphs of earlier stages are no longer needed, and a long sweep would reach the limit of 256.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    torch.manual_seed(recipe.seed)
    student = start.of(recipe.student)
    net = load_net(student, data, student.weights)
    if checkpoint:
        keep_plain(checkpoint, [net.model, *(one.model for one in teachers)])
    # What compile=auto resolved to when the run began: on another device it could differ. The
    # precision need not be stored: its name is in the saved recipe.
    compile = checkpoint.state["decisions"]["compile"] if checkpoint else recipe.compile
    if folder and session.world.is_main:
        role = "teacher" if recipe.name.startswith(TEACHES) else "student"
        for fact in start_of(student, net, data, role):
            session.console.note(fact)
    return build_trainer(
        _plan(recipe, data, session.world),
        student=net.model,
        teaching=Teaching(teachers, cache),
        terms=build_terms(recipe.losses),
        data=TrainData(
            data.train, data.val, data.facts, data.train.num_samples, _remedies(recipe, data)
        ),
        settings=TrainingSettings(
            optim=recipe.scaled_optim(),
            xprime=recipe.augment.xprime,
            mixing=recipe.augment.mixing,
            sizes=recipe.augment.sizes,
            pick=recipe.augment.pick,
            ema=recipe.ema,
            sync_bn=recipe.sync_bn,
            max_skips=recipe.max_skips,
            compile=compile,
            compile_reason="checkpoint" if checkpoint else "key",
        ),
        placement=session.placement(recipe),
        output=Output(folder, session.console, record=recipe.report.record),
    )


def build_encoder_stage(
    recipe: Recipe, data: DataPair, teachers: tuple[LoadedNet, ...], session: Session
) -> Trainer | None:
    """The training of the encoder before the recipe's own, without a folder; None without one."""
    lesson = recipe.of_encoder()
    if lesson is None:
        return None
    return build_stage(lesson, strided(data, lesson.data.label_stride), teachers, session)


def _remedies(recipe: Recipe, data: DataPair) -> Remedies:
    return Remedies(
        called="the teacher" if recipe.name.startswith(TEACHES) else "the student",
        student=of_images(data),
        last_batch="set data.drop_last=true, or another batch_size",
        every_batch="set a larger batch_size",
    )


def _plan(recipe: Recipe, data: DataPair, world: World) -> Plan:
    digest = recipe.digest()
    # Rank 0 alone writes weights.
    remembered = data.remembered.to_metadata() if world.is_main else {}
    return Plan(
        stage=recipe.name,
        digest=digest,
        seed=recipe.seed,
        data_seed=recipe.data_seed,
        epochs=recipe.total_epochs,
        accumulate=recipe.accumulate,
        save_steps=recipe.save_steps,
        eval_epochs=recipe.eval_epochs,
        epoch_factor=recipe.epoch_factor,
        cycle=recipe.augment.cycle,
        metadata=remembered | {"recipe": recipe.name, "digest": digest},
    )


def identity_of(recipe: Recipe, data: DataPair, session: Session) -> RunIdentity:
    """What the folder of this training must know of it, on all ranks."""
    return on_main(session.world, lambda: RunIdentity.of(recipe, data.remembered))


def facts_of_stage(trainer: Trainer, data: DataPair) -> dict[str, Any]:
    """What summary.json says of data and network."""
    palette = palette_of(data)
    facts = facts_of_run(data.remembered, facts_of(trainer.kept()))
    return facts if palette is None else facts | {"palette": palette}


def train_stage(
    recipe: Recipe,
    data: DataPair,
    session: Session,
    path: Path,
    teachers: tuple[LoadedNet, ...] = (),
) -> dict[str, Any]:
    """Train a teacher, a baseline or an encoder in `path`, or resume it; a finished one's summary
    is read."""
    identity = identity_of(recipe, data, session)

    def prepare() -> tuple[RunFolder, dict[str, Any] | None]:
        folder = stage_folder(identity, path)
        return folder, folder.summary()

    def waiting() -> None:
        session.console.note(f"{recipe.name}: another run is using {path}, waiting for it")

    with occupied(path, session.world, waiting):
        folder, finished = on_main(session.world, prepare)
        if finished is not None:
            session.console.note(f"{recipe.name}: finished before, {path}")
            return {key: value for key, value in finished.items() if key not in _OF_THE_FOLDER}
        if data.seed != recipe.data_seed:
            # Without data.seed a teacher's own seed also decides how it sees the images.
            data = _open_data(recipe, session)
        with tidy(folder, session.root, session.world):
            start = encoder_first(recipe, data, session, folder.path, teachers)
            checkpoint = open_checkpoint(folder.path, identity.digest, session.world)
            trainer = build_stage(recipe, data, teachers, session, folder, checkpoint, start=start)
            go_on(trainer, folder, checkpoint, session)
            del checkpoint  # as large as the student and its optimizer
            summary = to_its_end(fit(trainer, recipe, data)) | start.summary
            on_main(session.world, lambda: folder.finish(summary | facts_of_stage(trainer, data)))
    return summary


def encoder_first(
    recipe: Recipe,
    data: DataPair,
    session: Session,
    folder: Path,
    teachers: tuple[LoadedNet, ...],
) -> Start:
    """The encoder that the recipe trains before its own network, below the folder of that one."""

    def train(lesson: Recipe, path: Path) -> dict[str, Any]:
        smaller = strided(data, lesson.data.label_stride)
        return train_stage(lesson, smaller, session, path, teachers)

    return train_encoder(recipe, folder, train)


def fit(
    trainer: Trainer, recipe: Recipe, data: DataPair, stop: StopSignal | None = None
) -> Generator[Position, None, dict[str, Any]]:
    """Train, step by step; returns the entries of summary.json that every stage has."""
    summary = yield from trainer.training(stop)
    return with_class_names(summary, data.facts.classes) | {
        "recipe": recipe.name,
        "digest": recipe.digest(),
        "student": recipe.student.name,
        "lr": recipe.optim.lr,
        **_kept_answers(trainer),
        **size(trainer.kept(), data.facts.image_shape),
        "history": trainer.history,
    }


def _kept_answers(trainer: Trainer) -> dict[str, Any]:
    """For summary.json, if the teacher's answers are kept."""
    if not isinstance(trainer.teacher, CachedTeacher):
        return {}
    return {"answers": trainer.teacher.report()}


def go_on(
    trainer: Trainer, folder: RunFolder, checkpoint: Checkpoint | None, session: Session
) -> None:
    """Continue an unfinished folder; one without a checkpoint yet starts over."""
    if checkpoint is not None:
        trainer.resume(checkpoint)
    elif session.world.is_main:
        folder.set_metrics(())
        folder.cut_records(-1)
