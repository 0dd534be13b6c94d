"""What the last layer of the networks of a run gets of validation images, for their t-SNE.

Flow: `fastkd report` calls `keep_activations` for a finished run; the file that it writes below
record/ is drawn by `report.figures.embeddings`, now or later, without images or networks. As in
"On the Demystification of Knowledge Distillation", figure 2, these are the teacher, the student
alone and the distilled student, and the classes on which the student alone is worst.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastkd.compute.placement import Placement
from fastkd.compute.ranks import open_world
from fastkd.data import DataPair
from fastkd.errors import UserError
from fastkd.evaluation.evaluate import EvalLoader
from fastkd.models.card import card_of, title_of
from fastkd.models.registry import model_from_file
from fastkd.output.console import Console
from fastkd.output.run_folder import RunFolder
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.report.alone import alone_folder
from fastkd.report.runs_read import read_run
from fastkd.runs.saved_network import weights_of
from fastkd.runs.stages import Session, open_recipe_data, teacher_folder
from fastkd.storage.weight_file import WeightFile
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.loading import filled, load_teacher
from fastkd.teachers.parts import last_linear
from fastkd.teachers.teacher import Teacher

__all__ = ["CLASSES", "keep_activations"]

CLASSES = 3
"""Of the paper."""
_EACH = 200
"""Images of a class at most, the first ones."""


@dataclass(frozen=True)
class _Seen:
    """One network on all validation images that have a label."""

    activations_ND: np.ndarray
    """float16."""
    right_N: np.ndarray
    labels_N: np.ndarray

    def accuracy(self, classes: Iterable[int]) -> float:
        """Share of 1 of the images of these classes."""
        return float(self.right_N[np.isin(self.labels_N, list(classes))].mean())


def keep_activations(
    run: Path, *, classes: Sequence[int] = (), root: Path = Path("runs")
) -> dict[int, dict[str, np.ndarray]]:
    """Ask the networks of a run, and keep record/activations-epochNNNN.npz of its best epoch.

    classes: ids; (): the three on which the student alone, or else the student, is worst. root:
    where the run's teacher was trained, if it was. A teacher that is not there, and several
    teachers, are left out.

    Returns:
        Epoch -> arrays, as `ReportedRun.recorded`: `labels_N`, `classes_K`, and of each network
        `NAME` in teacher, alone, student `NAME_ND` (fp16) and `NAME_accuracy` of these classes.

    Raises:
        UserError: the run has no weights, its images have no classes, or are not there.
    """
    weights_of(run)
    read = read_run(run)
    recipe = load_recipe(None, config=run / "config.yaml")
    with open_world(recipe.device) as world:
        session = Session(world, Console(enabled=False), root)
        data, placement = open_recipe_data(recipe, session), session.placement(recipe)
        if data.facts.label_kind != "class" or data.val is None:
            raise UserError(
                f"{run}: the t-SNE is of images with one class each, and these have others"
            )
        nets = _teacher(recipe, data, session)
        alone = alone_folder(read)
        if alone is not None and (alone / "best.safetensors").exists():
            nets["alone"] = _saved(alone)
        nets["student"] = _saved(run)
        seen = {
            name: found
            for name, net in nets.items()
            if (found := _asked(net, data, placement)) is not None
        }
    if "student" not in seen:
        raise UserError(f"{run}: its network has no last linear layer whose input could be shown")
    judge = seen.get("alone", seen["student"])
    chosen = tuple(classes) or _worst(judge)
    rows_N = _rows(judge.labels_N, chosen)
    arrays = {"labels_N": judge.labels_N[rows_N], "classes_K": np.array(chosen)}
    for name, one in seen.items():
        arrays[f"{name}_ND"] = one.activations_ND[rows_N]
        arrays[f"{name}_accuracy"] = np.array(one.accuracy(chosen))
    summary = read.summary or {}
    epoch = int(summary.get("best_epoch") or len(read.history))
    RunFolder(run).write_record("activations", epoch, arrays)
    return {epoch: arrays}


def _saved(run: Path) -> LoadedNet:
    file = WeightFile.open(weights_of(run))
    model = model_from_file(file)
    card = card_of(model)
    return LoadedNet(model, card.normalization if card else None, name=title_of(model))


def _teacher(recipe: Recipe, data: DataPair, session: Session) -> dict[str, LoadedNet]:
    """The single teacher of a recipe with its weights; empty if there is none, or they are gone."""
    if recipe.teacher is None or recipe.teacher.ensemble:
        return {}
    try:
        (net,) = load_teacher(recipe.teacher, data)
        if recipe.teacher.trains:
            net = filled(net, teacher_folder(recipe.as_teacher(), data, session))
    except (UserError, FileNotFoundError):
        return {}
    return {"teacher": net}


def _asked(net: LoadedNet, data: DataPair, placement: Placement) -> _Seen | None:
    """None without a linear layer at the end."""
    network = Teacher(
        net, {}, placement, data_normalization=data.facts.normalization, fold_batch_norm=False
    )
    layer = last_linear(network.model)
    if layer is None:
        return None
    assert data.val is not None
    return _collected(network, layer, data.val)


def _collected(network: Teacher, layer: nn.Linear, loader: EvalLoader) -> _Seen:
    got: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        got.append(args[0])

    handle = layer.register_forward_pre_hook(note)
    inputs: list[np.ndarray] = []
    right: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    try:
        with torch.no_grad():
            for batch in loader.epoch(0):
                got.clear()
                answers_N = network.logits(batch.images_NCHW).argmax(1)
                known_N = batch.labels_N >= 0
                inputs.append(got[-1].flatten(1)[known_N].half().cpu().numpy())
                right.append((answers_N == batch.labels_N)[known_N].cpu().numpy())
                labels.append(batch.labels_N[known_N].cpu().numpy())
    finally:
        handle.remove()
    return _Seen(np.concatenate(inputs), np.concatenate(right), np.concatenate(labels))


def _worst(seen: _Seen) -> tuple[int, ...]:
    """The classes with the lowest accuracies, the lower id first where they are equal."""
    known = sorted(np.unique(seen.labels_N).tolist())
    return tuple(sorted(known, key=lambda label: seen.accuracy([label]))[:CLASSES])


def _rows(labels_N: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """The first images of each class."""
    found: Mapping[int, np.ndarray] = {one: np.flatnonzero(labels_N == one) for one in classes}
    return np.concatenate([rows[:_EACH] for rows in found.values()])
