"""A recipe as a whole: data, teacher, baselines, distilled student, comparison, report.

Every stage is one training in its own run folder, so each can be resumed and reused by itself:
the teacher below runs/teachers, the baselines below the run's own folder.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastkd.compute.placement import Placement
from fastkd.compute.precision import resolve_precision
from fastkd.compute.ranks import World, on_main
from fastkd.data import DataPair, open_data
from fastkd.errors import Interrupted
from fastkd.evaluation.headline import headline
from fastkd.losses.base.registry import build_terms
from fastkd.output.console import Console
from fastkd.output.occupancy import occupied, tidy
from fastkd.output.run_folder import RunFolder
from fastkd.recipe.schema import Recipe
from fastkd.report.comparison import finish_report
from fastkd.runs.folders import choose_folder, stage_folder
from fastkd.storage.checkpoint import Checkpoint
from fastkd.teachers.ensemble import LoadedNet
from fastkd.teachers.loading import load_net, load_teacher, prove_teacher, size, start_of
from fastkd.training.build import build_trainer
from fastkd.training.checkpointing import open_checkpoint
from fastkd.training.progress import Plan
from fastkd.training.settings import Output, TrainData, TrainingSettings
from fastkd.training.trainer import Trainer

__all__ = [
    "Session",
    "build_stage",
    "open_recipe_data",
    "run_recipe",
    "teacher_folder",
]


@dataclass(frozen=True)
class Session:
    """What all stages of a run share."""

    world: World
    console: Console
    root: Path
    """Where run folders go unless `out` says otherwise."""


def run_recipe(recipe: Recipe, session: Session, *, resume: str | None = None) -> dict[str, Any]:
    """Train what the recipe asks for and return its summary.

    resume: None, "auto" (the newest unfinished run of this digest, else a new one) or a run folder.
    """
    data = open_recipe_data(recipe, session)
    _try_out(recipe, data, session)
    folder, resumed = on_main(
        session.world, lambda: choose_folder(recipe, session.root, resume, session.console)
    )
    session.console.note(f"run folder {folder.path}")
    go_on = f"Go on with: fastkd train --resume {folder.path}"
    try:
        with occupied(folder.path, session.world), tidy(folder, session.root, session.world):
            teacher, teacher_summary = prove_teacher(
                *(recipe.teacher, data, session.world, session.console),
                train=lambda member: _teach(data, session, recipe.as_teacher(member)),
                precision=recipe.precision,
                channels_last=recipe.channels_last,
            )
            alone = [
                _train(
                    recipe.without_teacher(f"{recipe.name}/alone-lr{lr:g}", lr),
                    data,
                    session,
                    folder.path / "alone" / f"lr-{lr:g}",
                )
                for lr in recipe.baseline.lrs
            ]
            teachers = teacher.members if teacher else ()
            checkpoint = open_checkpoint(folder, session.world) if resumed else None
            trainer = build_stage(recipe, data, teachers, session, folder, checkpoint)
            if resumed:
                _go_on(trainer, folder, checkpoint, session)
            last = f"{headline(alone[0])}_last" if alone else ""
            best_alone = max(alone, key=lambda run: run[last], default=None)
            summary = _fit(trainer, recipe, data) | {
                "teacher": teacher_summary,
                "alone": best_alone,
                "alone_tried": [{"lr": run["lr"], last: run[last]} for run in alone],
            }
            if session.world.is_main:
                finish_report(recipe, summary, folder, session.console)
    except Interrupted as stopped:
        raise Interrupted(f"{stopped} {go_on}", stopped.exit_code) from None
    except KeyboardInterrupt:
        # Where another rank failed first, the folder may be gone.
        advice = f" {go_on}" if folder.path.exists() else ""
        raise Interrupted(f"stopped.{advice}", 130) from None
    return summary


def _try_out(recipe: Recipe, data: DataPair, session: Session) -> None:
    """Find what does not fit before the teacher is trained, and leave no folder behind."""
    teacher = load_teacher(recipe.teacher, data)
    silent = replace(session, console=Console(enabled=False))
    build_stage(recipe, data, teacher.members if teacher else (), silent)


def open_recipe_data(recipe: Recipe, session: Session) -> DataPair:
    """Both splits as the recipe wants them, this rank's share."""
    precision = resolve_precision(recipe.precision, session.world.device)
    data, augment = recipe.data, recipe.augment
    return open_data(
        name=data.name,
        root=data.root,
        backend=data.backend,
        image_size=data.image_size,
        download=data.download,
        train_limit=data.train_limit,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        crop=augment.crop,
        geometry_padding=augment.padding,
        geometry_mode=augment.pad_mode,
        flip=augment.flip,
        mean=data.mean,
        std=data.std,
        workers=data.workers,
        device=session.world.device,
        dtype=precision.dtype,
        channels_last=recipe.channels_last,
        rank=session.world.rank,
        world_size=session.world.size,
        drop_last=data.drop_last,
    )


def build_stage(
    recipe: Recipe,
    data: DataPair,
    teachers: tuple[LoadedNet, ...],
    session: Session,
    folder: RunFolder | None = None,
    checkpoint: Checkpoint | None = None,
) -> Trainer:
    """The recipe's own training, in a folder or without one.

    checkpoint: the one that the caller will resume.
    """
    # Graphs of earlier stages are of no use now, and a long sweep would meet the limit of 256.
    torch.compiler.reset()
    torch.manual_seed(recipe.seed)
    net = load_net(recipe.student, data, recipe.student.weights)
    # What compile=auto came to when the run began: on another device it could be otherwise. The
    # precision needs no such memory: its name stands in the saved recipe.
    compile = checkpoint.state["decisions"]["compile"] if checkpoint else recipe.compile
    if folder and session.world.is_main:
        for fact in start_of(recipe.student, net, data):
            session.console.note(fact)
    return build_trainer(
        _plan(recipe, data),
        student=net.model,
        teachers=teachers,
        terms=build_terms(recipe.losses),
        data=TrainData(data.train, data.val, data.facts, data.train.num_samples),
        settings=TrainingSettings(
            optim=recipe.scaled_optim(),
            xprime=recipe.augment.xprime,
            pick=recipe.augment.pick,
            ema=recipe.ema,
            sync_bn=recipe.sync_bn,
            max_skips=recipe.max_skips,
            compile=compile,
        ),
        placement=Placement(
            session.world,
            resolve_precision(recipe.precision, session.world.device),
            recipe.channels_last,
        ),
        output=Output(folder, session.console),
    )


def _plan(recipe: Recipe, data: DataPair) -> Plan:
    digest = recipe.digest()
    return Plan(
        stage=recipe.name,
        digest=digest,
        seed=recipe.seed,
        epochs=recipe.total_epochs,
        accumulate=recipe.accumulate,
        save_steps=recipe.save_steps,
        eval_epochs=recipe.eval_epochs,
        epoch_factor=recipe.epoch_factor,
        metadata={
            "normalization": json.dumps((data.mean, data.std)),
            "recipe": recipe.name,
            "digest": digest,
        },
    )


def _train(recipe: Recipe, data: DataPair, session: Session, path: Path) -> dict[str, Any]:
    """Train one stage without a teacher in `path`, or go on with it.

    The summary of a finished one is just returned.
    """

    def prepare() -> tuple[RunFolder, dict[str, Any] | None]:
        folder = stage_folder(recipe, path)
        return folder, folder.summary()

    def waiting() -> None:
        session.console.note(f"{recipe.name}: another run is at work in {path}, waiting for it")

    with occupied(path, session.world, waiting):
        folder, finished = on_main(session.world, prepare)
        if finished is not None:
            session.console.note(f"{recipe.name}: finished before, {path}")
            return finished
        if data.seed != recipe.seed:
            # A teacher's own seed also decides the order in which it sees the images.
            data = open_recipe_data(recipe, session)
        with tidy(folder, session.root, session.world):
            checkpoint = open_checkpoint(folder, session.world)
            trainer = build_stage(recipe, data, (), session, folder, checkpoint)
            _go_on(trainer, folder, checkpoint, session)
            summary = _fit(trainer, recipe, data)
        on_main(session.world, lambda: folder.finish(summary))
    return summary


def _teach(data: DataPair, session: Session, lesson: Recipe) -> tuple[Path, dict[str, Any]]:
    """Train a teacher, or find it trained: its run folder and summary."""
    path = teacher_folder(lesson, session)
    return path, _train(lesson, data, session, path)


def _fit(trainer: Trainer, recipe: Recipe, data: DataPair) -> dict[str, Any]:
    """Train; what summary.json says of a stage, whoever asked for it."""
    return trainer.fit() | {
        "recipe": recipe.name,
        "digest": recipe.digest(),
        "student": recipe.student.name,
        "lr": recipe.optim.lr,
        **size(trainer.kept(), data),
        "history": trainer.history,
    }


def _go_on(
    trainer: Trainer, folder: RunFolder, checkpoint: Checkpoint | None, session: Session
) -> None:
    """Continue an unfinished folder; one without a checkpoint yet starts over."""
    if checkpoint is not None:
        trainer.resume(checkpoint)
    elif session.world.is_main:
        folder.cut_metrics(0)


def teacher_folder(lesson: Recipe, session: Session) -> Path:
    """Where a teacher is trained once for all recipes that want the same one."""
    return session.root / "teachers" / f"{lesson.student.name}-{lesson.digest()[:8]}"
