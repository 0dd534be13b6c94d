"""The answers of saved networks to the validation images, for the figures of `fastkd report`.

Flow: `keep_answers` asks the student, the student alone and the teacher of every run through the
code that `fastkd eval` uses, and keeps the answers in one small file for each network, named by the
digest of its weights and of the data's keys. What is there is not asked again.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fastkd.errors import FastKDError, UserError
from fastkd.evaluation.evaluate import answer
from fastkd.report.answers import NETWORKS, TOP, Answers
from fastkd.report.runs_read import ReportedRun
from fastkd.runs.run_networks import WEIGHTS, RunNetwork, asking, network_of_run
from fastkd.storage.atomic import writing

__all__ = ["FOLDER", "keep_answers"]

FOLDER = "predictions"
"""In the folder of a report."""


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
    network = network_of_run(run, name, keys)
    if network is None:
        return None
    file = folder / f"{name}-{network.digest}.npz"
    if file.exists():
        return file
    if not ask:
        return None
    _ask(network).write(file)
    return file


def _ask(network: RunNetwork) -> Answers:
    with asking(network.recipe) as (data, placement):
        forward = network.bind(data, placement).logits
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
