"""The saved networks of a run for the figures of `fastkd report`: student, student alone, teacher.

Flow: `kept_answers` and `activations` find one by `network_of_run`, and show it the validation
images inside `asking`.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.compute.placement import Placement
from fastkd.compute.ranks import open_world
from fastkd.data import DataPair
from fastkd.errors import UserError
from fastkd.models.registry import model_from_file
from fastkd.output.console import Console
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.report.runs_read import ReportedRun
from fastkd.runs.evaluate_saved import for_evaluation, network_on
from fastkd.runs.stages import Session, open_recipe_data
from fastkd.storage.weight_file import WeightFile
from fastkd.teachers.config import MemberConfig
from fastkd.teachers.ensemble import Ensemble, bind_teacher
from fastkd.teachers.loading import filled, load_teacher
from fastkd.teachers.teacher import Teacher

__all__ = ["WEIGHTS", "RunNetwork", "asking", "network_of_run"]

WEIGHTS = "best.safetensors"

Bind = Callable[[DataPair, Placement], Teacher | Ensemble]


@dataclass(frozen=True)
class RunNetwork:
    """One network of a run with its best weights, not built yet."""

    recipe: Recipe
    """With the keys that hold here, such as data.root."""
    digest: str
    """Of the weights' bytes, and of the keys that decide what is shown."""
    bind: Bind
    """Builds it for the data of `asking`."""


def network_of_run(run: ReportedRun, name: str, keys: Sequence[str]) -> RunNetwork | None:
    """A network by its key of `report.answers.NETWORKS`; None if the run does not have it.

    keys: of the data, where a run's own do not hold here. UserError where it is not found.
    """
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
        bind = _of_teachers(recipe, weights)
    else:
        weights = [config / WEIGHTS]
        bind = _of_student(recipe, weights[0])
    return RunNetwork(recipe, _digest(recipe, weights, named=name == "teacher"), bind)


@contextmanager
def asking(recipe: Recipe) -> Generator[tuple[DataPair, Placement]]:
    """The recipe's data and where its networks run. UserError for images without one class each."""
    with open_world(recipe.device) as world:
        session = Session(world, Console(enabled=False), Path("runs"))
        data, placement = open_recipe_data(recipe, session), session.placement(recipe)
        if data.facts.label_kind != "class":
            raise UserError("they are kept of images with one class each only")
        yield data, placement


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


def _of_student(recipe: Recipe, weights: Path) -> Bind:
    def build(data: DataPair, placement: Placement) -> Teacher | Ensemble:
        model = model_from_file(WeightFile.open(weights))
        return network_on(model, data, recipe, placement)

    return build


def _of_teachers(recipe: Recipe, weights: Sequence[Path | None]) -> Bind:
    def build(data: DataPair, placement: Placement) -> Teacher | Ensemble:
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
        )

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
