"""A recipe as a whole: data, teacher, baselines, distilled student, comparison, report.

Every stage is one training in its own run folder, so each can be resumed and reused by itself:
the teacher below runs/teachers, the baselines below the run's own folder.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.build import Engine, TeacherNet, build_trainer, decide
from fastkd.checkpoint import load_checkpoint
from fastkd.data import DataPair, open_data
from fastkd.distributed import World, on_main
from fastkd.errors import Interrupted, UserError
from fastkd.evaluate import evaluate
from fastkd.folders import choose_folder, occupied, stage_folder, tidy
from fastkd.layout import memory_format
from fastkd.losses.registry import build_terms
from fastkd.models import count, create_model
from fastkd.precision import resolve_precision
from fastkd.recipe.networks import StudentConfig, TeacherConfig
from fastkd.recipe.schema import Recipe
from fastkd.report.comparison import finish_report
from fastkd.report.console import Console
from fastkd.report.run_folder import RunFolder
from fastkd.trainer import Plan, Trainer
from fastkd.weights import load_weights

__all__ = [
    "Session",
    "open_recipe_data",
    "run_recipe",
    "stage_builder",
    "teacher_folder",
    "untrained_teacher",
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
    # What does not fit is found before the teacher is trained, and leaves no folder behind.
    stage_builder(recipe, data, untrained_teacher(recipe, data), session)(None)
    folder, resumed = on_main(
        session.world, lambda: choose_folder(recipe, session.root, resume, session.console)
    )
    session.console.note(f"run folder {folder.path}")
    go_on = f"Go on with: fastkd train --resume {folder.path}"
    try:
        with occupied(folder.path, session.world), tidy(folder, session.root, session.world):
            teacher, teacher_summary = _teacher(recipe, data, session)
            alone = [
                _train(
                    recipe.without_teacher(f"{recipe.name}/alone-lr{lr:g}", lr),
                    data,
                    None,
                    session,
                    folder.path / "alone" / f"lr-{lr:g}",
                )
                for lr in recipe.baseline.lrs
            ]
            trainer = stage_builder(recipe, data, teacher, session)(folder)
            if resumed:
                _go_on(trainer, folder, session)
            best_alone = max(alone, key=lambda run: run["accuracy_last"], default=None)
            summary = _fit(trainer, recipe, data) | {
                "teacher": teacher_summary,
                "alone": best_alone,
                "alone_tried": [
                    {"lr": run["lr"], "accuracy_last": run["accuracy_last"]} for run in alone
                ],
            }
            if session.world.is_main:
                finish_report(recipe, summary, folder, session.console)
    except Interrupted as stopped:
        raise Interrupted(f"{stopped} {go_on}", stopped.exit_code) from None
    except KeyboardInterrupt:
        raise Interrupted(f"stopped. {go_on}", 130) from None
    return summary


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


def stage_builder(
    recipe: Recipe, data: DataPair, teacher: TeacherNet | None, session: Session
) -> Callable[[RunFolder | None], Trainer]:
    """A function that builds the recipe's own training, in a folder or without one."""

    def build(folder: RunFolder | None) -> Trainer:
        # Graphs of earlier stages are of no use now, and a long sweep would meet the limit of 256.
        torch.compiler.reset()
        torch.manual_seed(recipe.seed)
        student = _load_net(recipe.student, data, recipe.student.weights).model
        terms = build_terms(recipe.losses)
        precision, compiled = decide(
            precision=recipe.precision,
            compile_mode=_saved_compile(folder, session.world) or recipe.compile,
            device=session.world.device,
            student=student,
            teacher=teacher.model if teacher else None,
            terms=terms,
            image_shape=_shape(data),
            images=data.train.num_samples * recipe.total_epochs,
        )
        normalization = (data.mean, data.std)
        return build_trainer(
            Plan(
                stage=recipe.name,
                digest=recipe.digest(),
                seed=recipe.seed,
                epochs=recipe.total_epochs,
                accumulate=recipe.accumulate,
                save_steps=recipe.save_steps,
                eval_epochs=recipe.eval_epochs,
                epoch_factor=recipe.epoch_factor,
                metadata={
                    "normalization": json.dumps(normalization),
                    "recipe": recipe.name,
                    "digest": recipe.digest(),
                },
            ),
            student=student,
            teacher=teacher,
            terms=terms,
            optim=recipe.scaled_optim(),
            engine=Engine(
                precision,
                compiled,
                recipe.channels_last,
                recipe.sync_bn,
                recipe.ema,
                recipe.max_skips,
            ),
            loader=data.train,
            val_loader=data.val,
            image_shape=_shape(data),
            num_classes=len(data.classes),
            train_labels_N=data.train.labels_N,
            normalization=normalization,
            xprime=recipe.augment.xprime,
            pick=recipe.augment.pick,
            world=session.world,
            folder=folder,
            console=session.console,
        )

    return build


def _train(
    recipe: Recipe, data: DataPair, teacher: TeacherNet | None, session: Session, path: Path
) -> dict[str, Any]:
    """Train one stage in `path`, or go on with it; a finished one's summary is just returned."""

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
        with tidy(folder, session.root, session.world):
            trainer = stage_builder(recipe, data, teacher, session)(folder)
            _go_on(trainer, folder, session)
            summary = _fit(trainer, recipe, data)
        on_main(session.world, lambda: folder.finish(summary))
    return summary


def _fit(trainer: Trainer, recipe: Recipe, data: DataPair) -> dict[str, Any]:
    """Train; what summary.json says of a stage, whoever asked for it."""
    return trainer.fit() | {
        "recipe": recipe.name,
        "digest": recipe.digest(),
        "student": recipe.student.name,
        "lr": recipe.optim.lr,
        **_size(trainer.kept(), data),
        "history": trainer.history,
    }


def _go_on(trainer: Trainer, folder: RunFolder, session: Session) -> None:
    """Continue an unfinished folder; one without a checkpoint yet starts over."""
    # Rank 0 decides: another host may see a new file of a shared folder late.
    if on_main(session.world, (folder.path / "last.pt").exists):
        trainer.resume(folder.path / "last.pt")
    elif session.world.is_main:
        folder.cut_metrics(0)


def _teacher(
    recipe: Recipe, data: DataPair, session: Session
) -> tuple[TeacherNet | None, dict[str, Any] | None]:
    """The recipe's teacher, trained first if it asks for that, and proven better than chance."""
    config = recipe.teacher
    if config is None:
        return None, None
    weights, summary = config.weights, None
    if config.trains:
        lesson = recipe.as_teacher()
        path = teacher_folder(lesson, session)
        summary = _train(lesson, data, None, session, path)
        weights = str(path / "best.safetensors")
    net = _load_net(config, data, weights)
    accuracy = _accuracy(net, recipe, data, session)
    session.console.note(f"teacher {config.name}: accuracy {accuracy:.2%}")
    floor = config.min_accuracy
    if floor is None:
        chance = 1 / len(data.classes)
        floor = chance + 2 * (chance * (1 - chance) / data.val.num_samples) ** 0.5
    if accuracy < floor:
        raise UserError(
            f"the teacher {config.name} reaches {accuracy:.2%} on the validation images, at least "
            f"{floor:.2%} was expected. If its weights are right, its class order "
            f"(teacher.class_map) or normalisation is not; if it was just trained, give it more "
            f"epochs; teacher.min_accuracy=0 accepts it as it is"
        )
    facts = {"name": config.name, "accuracy": accuracy, **_size(net.model, data)}
    return net, facts | ({"training": summary} if summary else {})


def teacher_folder(lesson: Recipe, session: Session) -> Path:
    """Where a teacher is trained once for all recipes that want the same one."""
    return session.root / "teachers" / f"{lesson.student.name}-{lesson.digest()[:8]}"


def untrained_teacher(recipe: Recipe, data: DataPair) -> TeacherNet | None:
    """The recipe's teacher, with its weights unless they are still to be trained."""
    if recipe.teacher is None:
        return None
    return _load_net(recipe.teacher, data, recipe.teacher.weights)


def _accuracy(net: TeacherNet, recipe: Recipe, data: DataPair, session: Session) -> float:
    from fastkd.teacher import Teacher

    precision = resolve_precision(recipe.precision, session.world.device)
    teacher = Teacher(
        net.model,
        {},
        precision=precision,
        device=session.world.device,
        data_normalization=(data.mean, data.std),
        normalization=net.normalization,
        resolution=net.resolution,
        class_map=net.class_map,
        layout=memory_format(recipe.channels_last, session.world.device, net.model),
        # To the digit what its own training reported.
        fold_batch_norm=False,
    )
    return evaluate(teacher.logits, data.val, precision, session.world)["accuracy"]


def _load_net(config: StudentConfig, data: DataPair, weights: str | None) -> TeacherNet:
    """Build a network of the data's class count and fill it from a file or a run folder."""
    class_map = config.class_map if isinstance(config, TeacherConfig) else None
    resolution = config.resolution if isinstance(config, TeacherConfig) else None
    options = config.options()
    if weights is not None and Path(weights).is_dir():
        weights = str(Path(weights) / "best.safetensors")
    classes = len(data.classes)
    if class_map is not None:
        classes = _own_classes(config.name, weights, classes)
    # A pretrained teacher that was then trained here has weights of its own.
    pretrained = config.pretrained and weights is None
    model: Any = create_model(
        config.name, classes, pretrained=pretrained, weights=weights, **options
    )
    if class_map is not None and not 0 <= min(class_map) <= max(class_map) < model.num_classes:
        raise UserError(
            f"teacher.class_map names outputs from {min(class_map)} to {max(class_map)}, but "
            f"{config.name} has {model.num_classes}, numbered from 0"
        )
    normalization = getattr(model, "normalization", None)
    if isinstance(config, TeacherConfig) and config.mean and config.std:
        normalization = (config.mean, config.std)
    return TeacherNet(model, normalization, resolution, class_map)


def _own_classes(name: str, weights: str | None, of_data: int) -> int | None:
    """Class count of a teacher whose outputs are mapped; None where the network's source knows."""
    if weights is None:
        return None if ":" in name else of_data
    tensors, facts = load_weights(weights)
    if "num_classes" in facts:
        return int(facts["num_classes"])
    # A checkpoint of others tells it by its last layer.
    heads = [tensor for tensor in tensors.values() if tensor.dim() == 2]
    return heads[-1].shape[0] if heads else of_data


def _saved_compile(folder: RunFolder | None, world: World) -> str | None:
    """What compile=auto came to when the run began: on another device it could be otherwise.

    The precision needs no such memory: its name stands in the saved recipe.
    """

    def read() -> str | None:
        if folder is None or not (folder.path / "last.pt").exists():
            return None
        return load_checkpoint(folder.path / "last.pt")["decisions"]["compile"]

    return on_main(world, read)


def _shape(data: DataPair) -> tuple[int, int, int]:
    return (3, data.image_size, data.image_size)


def _size(model: nn.Module, data: DataPair) -> dict[str, int]:
    size = count(model, _shape(data))
    return {"params": size.params, "macs": size.macs}
