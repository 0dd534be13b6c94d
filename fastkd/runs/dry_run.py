"""What a run would cost, measured on a few discarded steps of every stage: `--dry-run`.

Flow: `cli` calls this in place of `runs.stages`, whose parts build the run; nothing is written.
"""

import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count as forever
from typing import Any

import torch
from torch import nn

from fastkd.compute.ranks import on_main
from fastkd.data import DataPair
from fastkd.models.counting.count import cost
from fastkd.output.console import duration
from fastkd.recipe.schema import Recipe
from fastkd.runs.stages import (
    Session,
    build_encoder_stage,
    build_stage,
    open_recipe_data,
    teacher_folder,
)
from fastkd.teachers.loading import load_teacher
from fastkd.training.sharing import SharedBatches
from fastkd.training.step import Prepared
from fastkd.training.trainer import Trainer
from fastkd.training.trial import errors_as_sentences

__all__ = ["dry_run", "dry_run_together", "rehearse"]


def dry_run(recipe: Recipe, session: Session) -> dict[str, Any]:
    """Build everything, make two steps of every stage; what a real run would cost, by name."""
    data = open_recipe_data(recipe, session)
    image_shape = data.facts.image_shape
    stages: dict[str, float] = {}
    for name, stage, times in _earlier_stages(recipe, data, session):
        if encoder := build_encoder_stage(stage, data, (), session):
            stages[f"encoder of {name}"] = times * rehearse(encoder)["projected_seconds"]
        found = rehearse(build_stage(stage, data, (), session))
        stages[name] = times * found["projected_seconds"]
    teachers = load_teacher(recipe.teacher, data)
    members = recipe.teacher.members().values() if recipe.teacher else ()
    if encoder := build_encoder_stage(recipe, data, teachers, session):
        stages["encoder of student"] = rehearse(encoder)["projected_seconds"]
    trainer = build_stage(recipe, data, teachers, session)
    found = rehearse(trainer)
    stages["student distilled" if teachers else "student"] = found.pop("projected_seconds")
    projected = f"{duration(sum(stages.values()))} of training"
    if len(stages) > 1:
        projected += ": " + ", ".join(f"{name} {duration(s)}" for name, s in stages.items())
    return {
        "recipe": recipe.name,
        "train_images": data.train.num_samples,
        "val_images": data.val.num_samples,
        "image": image_shape,
        "classes": data.facts.num_classes,
        "evaluation": data.facts.shown,
        "backend": data.backend,
        "student": f"{recipe.student.label}: {_size(trainer.student, image_shape)}",
        "teacher": "; ".join(
            f"{keys.label}: {_size(one.model, one.image_shape(image_shape))}"
            for keys, one in zip(members, teachers, strict=True)
        )
        or "none",
        **_cache(recipe),
        "parts": ", ".join(f"{w:g} {n}" for t in trainer.terms for n, w in t.weights.items()),
        **trainer.decisions,
        "device": str(session.world.device),
        "ranks": session.world.size,
        **found,
        "projected_duration": projected,
    }


def _cache(recipe: Recipe) -> dict[str, str]:
    """What becomes of a cache of the teacher's answers here."""
    folder = recipe.teacher.cache if recipe.teacher else None
    if folder is None:
        return {}
    return {"teacher_cache": f"{folder}, left aside in a dry run: the teacher is asked"}


def dry_run_together(recipes: Mapping[str, Recipe], session: Session) -> dict[str, Any]:
    """The same of a group's students, all in memory, without what is trained before them.

    recipes: by label; they share data, views and teacher.
    """
    first, *_ = recipes.values()
    data = open_recipe_data(first, session)
    teachers = load_teacher(first.teacher, data)
    trainers = {
        label: build_stage(recipe, data, teachers, session) for label, recipe in recipes.items()
    }
    found = rehearse(*trainers.values())
    image_shape = data.facts.image_shape
    students = {label: _size(one.student, image_shape) for label, one in trainers.items()}
    projected = f"{duration(found.pop('projected_seconds'))} of training, of all students together"
    return {
        # Numbered: the names of facts are shown without underscores.
        "student": {n: f"{label}: {size}" for n, (label, size) in enumerate(students.items(), 1)},
        "teacher": "; ".join(one.label for one in first.teachers().values()) or "none",
        **_cache(first),
        "device": str(session.world.device),
        **found,
        "projected_duration": projected,
    }


def _size(model: nn.Module, image_shape: tuple[int, int, int]) -> str:
    found = cost(model, image_shape)
    params = sum(parameter.numel() for parameter in model.parameters())
    return f"{params:,} parameters, - multiply-accumulates" if found is None else str(found)


def _earlier_stages(
    recipe: Recipe, data: DataPair, session: Session
) -> list[tuple[str, Recipe, int]]:
    """What is trained before the recipe's own student: name, recipe, number of runs."""
    stages = []
    for key, one in recipe.teacher.members().items() if recipe.teacher else ():
        if not one.trains:
            continue
        lesson = recipe.as_teacher(one)
        summary = teacher_folder(lesson, data, session) / "summary.json"
        if not on_main(session.world, summary.exists):
            stages.append((f"{key} {one.label}", lesson, 1))
    if rates := recipe.baseline.lrs:
        alone = recipe.without_teacher(f"{recipe.name}/alone", rates[0])
        times = len(rates)
        stages.append((f"student alone ({times} runs)", alone, times))
    return stages


@errors_as_sentences()
def rehearse(*trainers: Trainer, steps: int = 2) -> dict[str, Any]:
    """Seconds of the first step, the last step and all steps, peak memory, input shapes.

    At the full size of the images, also where epochs have smaller ones: that needs most. Several
    trainers take turns on the same batches; a step is then one of each.
    """
    shared = SharedBatches() if len(trainers) > 1 else None
    trainers = tuple(
        replace(one, views=replace(one.views, sizes=()), shared=shared) for one in trainers
    )
    sources = [_batches(one) for one in trainers]
    clocks, shapes = [time.perf_counter()], {}
    for trainer in trainers:
        trainer.runner.train()
    for _ in range(steps):
        for trainer, source in zip(trainers, sources, strict=True):
            prepared = next(source)
            trainer.optimize(prepared, 0, 0)
            trainer.totals_M.tolist()  # waits for the device
            tensors = prepared.views | prepared.targets
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        clocks.append(time.perf_counter())
    first_s, each_s = clocks[1] - clocks[0], clocks[-1] - clocks[-2]
    num_steps = max(one.loader.steps_per_epoch * one.plan.epochs for one in trainers)
    return {
        "first_step_seconds": first_s,
        "seconds_per_step": each_s,
        "peak_memory_MiB": _peak_memory_mib(trainers[0].world.device),
        "shapes": shapes,
        "steps": num_steps,
        # The first step compiles.
        "projected_seconds": first_s + (num_steps - 1) * each_s,
    }


def _batches(trainer: Trainer) -> Iterator[Prepared]:
    for epoch in forever():
        yield from trainer.prepare(epoch)


def _peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
