"""The answers of saved networks to the validation images, for the figures of `fastkd report`.

Flow: `keep_answers` asks the student, the student alone and the teacher of every run through the
code that `fastkd eval` uses, and keeps the answers in one small file for each network, named by the
digest of its weights and of the data's keys. What is there is not asked again.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.compute.placement import Placement
from fastkd.compute.ranks import open_world
from fastkd.data import DataPair
from fastkd.errors import FastKDError, UserError
from fastkd.evaluation.evaluate import answer
from fastkd.models.registry import model_from_file
from fastkd.output.console import Console
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.report.answers import NETWORKS, TOP, Answers
from fastkd.report.runs_read import ReportedRun
from fastkd.runs.evaluate_saved import for_evaluation, network_on
from fastkd.runs.stages import Session, open_recipe_data
from fastkd.storage.atomic import writing
from fastkd.storage.weight_file import WeightFile
from fastkd.teachers.config import MemberConfig
from fastkd.teachers.ensemble import bind_teacher
from fastkd.teachers.loading import filled, load_teacher

__all__ = ["FOLDER", "keep_answers"]

FOLDER = "predictions"
"""In the folder of a report."""
WEIGHTS = "best.safetensors"

_Ask = Callable[[DataPair, Placement], Callable[[Tensor], Tensor]]


def keep_answers(
    runs: Sequence[ReportedRun],
    out: Path,
    keys: Sequence[str],
    *,
    ask: bool,
    say: Callable[[str], None],
) -> list[ReportedRun]:
    """The runs with the files of their networks' answers.

    out: folder of the report. keys: of the data, such as data.root, where a run's own do not hold
    here. ask: whether answers that are not there yet are computed. say: is told of every network
    without answers, and why; a report never fails for them.
    """
    folder = out / FOLDER
    if ask:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    found: list[ReportedRun] = []
    # Equal networks of several runs fail alike.
    said = set[str]()
    for run in runs:
        files: dict[str, Path] = {}
        if run.finished and not run.of_distill and (run.path / WEIGHTS).exists():
            for name in NETWORKS:
                try:
                    file = _answered(run, name, folder, keys, ask=ask)
                except FastKDError as error:
                    sentence = f"no answers of the {NETWORKS[name]} of {run.label}: {error}"
                    if ask and str(error) not in said:
                        say(sentence)
                    said.add(str(error))
                    continue
                if file is not None:
                    files[name] = file
        found.append(replace(run, predictions=files))
    return found


def _answered(
    run: ReportedRun, name: str, folder: Path, keys: Sequence[str], *, ask: bool
) -> Path | None:
    """The file of a network's answers; None for a network that the run does not have, or that is
    not asked. UserError where it cannot be asked."""
    config = run.path if name != "alone" else run.alone
    if config is None:
        return None
    recipe = for_evaluation(load_recipe(None, config=config / "config.yaml", overrides=keys))
    if name == "teacher":
        if recipe.teacher is None:
            return None
        # As it was trained: with the keys of the run alone.
        own = load_recipe(None, config=config / "config.yaml")
        weights = _weights_of_teachers(run.path, own)
        question = _of_teachers(recipe, weights)
    else:
        weights = [config / WEIGHTS]
        question = _of_student(recipe, weights[0])
    file = folder / f"{name}-{_digest(recipe, weights, named=name == 'teacher')}.npz"
    if file.exists():
        return file
    if not ask:
        return None
    _ask(recipe, question).write(file)
    return file


def _digest(recipe: Recipe, weights: Iterable[Path | None], *, named: bool) -> str:
    """Of the weights' bytes, and of the keys that decide what is shown.

    named: whether weights may also be named by the keys of the teacher.
    """
    keys: list[Any] = [recipe.data.outcome()]
    if named and recipe.teacher:
        keys.append(recipe.teacher.outcome())
    total = hashlib.sha256(json.dumps(keys, sort_keys=True).encode())
    for file in weights:
        if file is not None:
            with file.open("rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()[:16]


def _of_student(recipe: Recipe, weights: Path) -> _Ask:
    def build(data: DataPair, placement: Placement) -> Callable[[Tensor], Tensor]:
        model = model_from_file(WeightFile.open(weights))
        return network_on(model, data, recipe, placement).logits

    return build


def _of_teachers(recipe: Recipe, weights: Sequence[Path | None]) -> _Ask:
    def build(data: DataPair, placement: Placement) -> Callable[[Tensor], Tensor]:
        nets = load_teacher(recipe.teacher, data)
        nets = tuple(
            net if file is None else filled(net, file.parent)
            for net, file in zip(nets, weights, strict=True)
        )
        return bind_teacher(
            nets,
            {},
            placement,
            data_normalization=data.facts.normalization,
            fold_batch_norm=False,
        ).logits

    return build


def _weights_of_teachers(run: Path, recipe: Recipe) -> list[Path | None]:
    """Of those that were trained first; None for one whose weights the recipe names."""
    return [
        _trained(run, recipe, one) if one.trains else None for one in recipe.teachers().values()
    ]


def _trained(run: Path, recipe: Recipe, member: MemberConfig) -> Path:
    """Where `runs.stages` left a teacher: below runs/ of the folder that a run was started in."""
    lesson = recipe.as_teacher(member)
    name = f"{lesson.student.name}-{lesson.digest()[:8]}"
    roots = [Path("runs"), *run.resolve().parents]
    for root in roots:
        for folder in sorted((root / "teachers").glob(f"{name}*")):
            if (folder / WEIGHTS).exists():
                return folder / WEIGHTS
    raise UserError(
        f"the trained teacher is not found as teachers/{name} beside the run or below runs/: start "
        f"the report in the folder that the run was started in"
    )


def _ask(recipe: Recipe, question: _Ask) -> Answers:
    with ExitStack() as stack:
        world = stack.enter_context(open_world(recipe.device))
        session = Session(world, Console(enabled=False), Path("runs"))
        data, placement = open_recipe_data(recipe, session), session.placement(recipe)
        if data.facts.label_kind != "class":
            raise UserError("they are kept of images with one class each only")
        forward = question(data, placement)
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        with torch.no_grad():
            for batch in data.val.epoch(0):
                logits_NC = answer(forward, batch.images_NCHW, placement.precision)
                known_N = batch.labels_N >= 0
                top = logits_NC[known_N].softmax(1).topk(min(TOP, logits_NC.shape[1]), dim=1)
                labels_N = batch.labels_N[known_N]
                tensors = (labels_N.int(), top.indices.int(), top.values)
                parts.append(tuple(one.cpu().numpy() for one in tensors))  # type: ignore[arg-type]
    if not sum(len(labels_N) for labels_N, _, _ in parts):
        raise UserError("no validation image has a label")
    labels_N, top_NK, probability_NK = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    classes = data.facts.classes or tuple(map(str, range(data.facts.num_classes)))
    return Answers(labels_N, top_NK, probability_NK, classes)
