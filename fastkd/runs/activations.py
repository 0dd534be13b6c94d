"""What the last layers of a run's networks get of validation images, for their t-SNE.

Flow: `fastkd report --predict` calls `keep_activations` after `keep_answers`, which knows on which
classes the student alone is worst; the networks are shown images of these classes only. The file
beside the answers is drawn by `report.figures.embeddings`, now or later. As in "On the
Demystification of Knowledge Distillation", figure 2, these are the teacher, the student alone and
the distilled student.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastkd.compute.placement import Placement
from fastkd.errors import FastKDError, UserError
from fastkd.evaluation.evaluate import EvalLoader, answer
from fastkd.report.answers import NETWORKS, Answers, answers_of
from fastkd.report.runs_read import ReportedRun
from fastkd.runs.kept_answers import FOLDER
from fastkd.runs.run_networks import asking, network_of_run
from fastkd.storage.atomic import atomic_path
from fastkd.teachers.ensemble import Ensemble
from fastkd.teachers.parts import last_linear

__all__ = ["CLASSES", "EACH", "keep_activations"]

CLASSES = 3
"""Of the paper."""
EACH = 200
"""Images of a class at most, the first ones."""


def keep_activations(
    runs: Sequence[ReportedRun],
    out: Path,
    keys: Sequence[str],
    *,
    ask: bool,
    say: Callable[[str], None],
) -> list[ReportedRun]:
    """The runs with the files of what their last layers get; arguments as of `keep_answers`.

    A file has `labels_N`, `classes_K` (ids, the worst first), and of each network `NAME` in
    student, alone, teacher `NAME_ND` (fp16) and `NAME_accuracy`, a share of 1 of all validation
    images of these classes. Networks without answers, ensembles, and networks without a linear
    layer are left out.
    """
    found: list[ReportedRun] = []
    for run in runs:
        if "student" not in run.predictions:
            found.append(run)
            continue
        names = " ".join(sorted(file.name for file in run.predictions.values()))
        digest = hashlib.sha256(names.encode()).hexdigest()[:16]
        file = out / FOLDER / f"last_layers-{digest}.npz"
        if ask and not file.exists():
            try:
                _write(file, _asked(run, keys))
            except FastKDError as error:
                say(f"no t-SNE of {run.label}: {error}")
        found.append(replace(run, last_layers=file) if file.exists() else run)
    return found


def _write(file: Path, arrays: Mapping[str, Any]) -> None:
    with atomic_path(file) as beside, beside.open("wb") as opened:
        np.savez_compressed(opened, **arrays)


def _asked(run: ReportedRun, keys: Sequence[str]) -> dict[str, np.ndarray]:
    answers = answers_of(run)
    judge = answers.get("alone") or answers.get("student")
    if judge is None:
        raise UserError("its answers cannot be read")
    classes = _worst(judge)
    arrays: dict[str, np.ndarray] = {"classes_K": np.array(classes)}
    for name in (name for name in NETWORKS if name in answers):
        network = network_of_run(run, name, keys)
        if network is None:
            continue
        with asking(network.recipe) as (data, placement):
            bound = network.bind(data, placement)
            layer = None if isinstance(bound, Ensemble) else last_linear(bound.model)
            if layer is None:
                continue
            inputs_ND, labels_N = _inputs(bound.logits, layer, data.val, classes, placement)
        arrays |= {f"{name}_ND": inputs_ND, "labels_N": labels_N}
        arrays[f"{name}_accuracy"] = np.array(_accuracy(answers[name], classes))
    if "labels_N" not in arrays:
        raise UserError("its networks have no last linear layer whose input could be shown")
    return arrays


def _inputs(
    forward: Callable[[Tensor], Any],
    layer: nn.Linear,
    loader: EvalLoader,
    classes: Sequence[int],
    placement: Placement,
) -> tuple[np.ndarray, np.ndarray]:
    """What the layer gets of the first images of each class, fp16 [N, D], and their labels."""
    got: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        got[:] = [args[0].detach().flatten(1)]

    left = dict.fromkeys(classes, EACH)
    inputs: list[np.ndarray] = []
    labels: list[int] = []
    handle = layer.register_forward_pre_hook(note)
    try:
        with torch.no_grad():
            for batch in loader.epoch(0):
                rows: list[int] = []
                for row, label in enumerate(batch.labels_N.tolist()):
                    if left.get(label):
                        left[label] -= 1
                        rows.append(row)
                        labels.append(label)
                if rows:
                    answer(forward, batch.images_NCHW[rows], placement.precision)
                    inputs.append(got[0].half().cpu().numpy())
    finally:
        handle.remove()
    return np.concatenate(inputs), np.array(labels)


def _worst(answers: Answers) -> tuple[int, ...]:
    """The classes with the lowest accuracies, the lower id first where they are equal."""
    known = np.unique(answers.labels_N).tolist()
    return tuple(sorted(known, key=lambda label: _accuracy(answers, [label]))[:CLASSES])


def _accuracy(answers: Answers, classes: Sequence[int]) -> float:
    """Share of 1 of the images of these classes."""
    own_N = np.isin(answers.labels_N, classes)
    return float((answers.predicted_N == answers.labels_N)[own_N].mean())
