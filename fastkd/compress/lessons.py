"""The recipes that train the original and its students: ordinary ones, of the recipe `folder`.

Every student gets the same keys, whatever made it: the same images, epochs and rate, attention
transfer at the ends of the stages and KD from the original, and first weights that are the
original's where they fit. It is evaluated once, at the end, so that no epoch is chosen. The short
distillations, by which the student is chosen, hold back training images for it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastkd.compress.space import taps_of
from fastkd.compress.student import Student
from fastkd.compute.precision import Precision
from fastkd.data import DataPair
from fastkd.errors import UserError
from fastkd.models import create_model
from fastkd.models.config import NETWORK_OPTIONS
from fastkd.models.intake import refusal
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.storage.weight_file import WeightFile
from fastkd.teachers.loading import load_net, of_images

__all__ = ["Lessons", "original_of"]

RANK_SHARE = 0.1
"""Share of the training images on which short distillations are compared: no choice reads the
validation images, so that the closing table is made of images that nobody saw."""

_MADE = ("block", "blocks", "depth")
_OURS = (
    *(f"student.{key}" for key in ("name", "weights", "pretrained", "new_head", "frozen")),
    *(f"teacher.{key}" for key in ("name", "weights", "pretrained", "new_head", "train")),
    *(f"{net}.{key}" for net in ("student", "teacher") for key in _MADE),
    "data.tune_share",
    "encoder",
    "baseline",
    "name=",
    "out=",
)
"""Beginnings of keys that compress sets itself, or that a network that changes cannot have."""
_AT = ("losses.at.weight=2", "losses.at.form=distance")
"""The distance of equation 2: it is at most 2 for a pair whatever the size of its maps. The mean
square, whose usual weight is 1000, would outweigh all else on the small maps of small images."""
_NETWORK = tuple(f"student.{key}=" for key in NETWORK_OPTIONS)


def original_of(model: str, weights: str | None, keys: Sequence[str]) -> tuple[Student, str | None]:
    """The network that is compressed, and its weights; None: it has to be trained.

    model: a name for `create_model`, with options as `student.KEY=` among the keys; a run folder or
        weight file of fastkd, which says its network.
    """
    path = Path(model)
    if model.endswith(".onnx"):
        raise UserError(
            f"{model} is an exported file, which is not trained again: give the run folder or the "
            f"weight file that it was made of"
        )
    if path.exists() and (path.is_file() or (path / "config.yaml").exists()):
        if weights is not None:
            raise UserError(f"{model} holds its weights: leave out --weights")
        facts = WeightFile.open(path).network
        if facts.architecture is None:
            raise UserError(
                f"{model} does not say which network it holds: give its name and --weights {model}"
            )
        name, options, weights = facts.architecture, dict(facts.options), model
    else:
        name, options = model, _options(model, keys)
        if weights is not None:
            facts = WeightFile.open(weights).network
            if facts.architecture == name:
                options = {**facts.options, **options}
    if other := [key for key in _MADE if options.get(key) not in (None, "S")]:
        raise UserError(
            f"{model} has {other[0]} already, and a network that was made cheap is not made cheap "
            f"again: compress the network that it was made of"
        )
    if name.startswith("simkd:"):
        raise UserError(f"{model} has the classifier of its teacher (SimKD): compress another")
    with torch.random.fork_rng(devices=[]):  # a name or option that does not exist
        create_model(name, 10, **options)
    return Student(name, options, ""), weights


def _options(name: str, keys: Sequence[str]) -> dict[str, Any]:
    own = [key for key in keys if key.startswith(_NETWORK)]
    blank = {
        "name": "compress",
        "data": {"name": "digits"},
        "student": {"name": name},
        "losses": {"ce": {"weight": 1.0}},
    }
    return load_recipe(None, values=blank, overrides=own).student.options()


class Lessons:
    """Makes the recipes of one compression."""

    def __init__(
        self, original: Student, weights: str | None, keys: Sequence[str], folder: Path
    ) -> None:
        for key in keys:
            if key in ("teacher=null", "teacher="):
                raise UserError(f"{key}: the students learn from the original; leave it out")
            if key.startswith(_OURS):
                raise UserError(
                    f"{key.partition('=')[0]}: compress decides about this key itself; leave it out"
                )
        self.original = original
        self.folder = folder
        self.trains = weights is None
        self.weights = Path(weights) if weights else folder / "runs" / "original"
        self.keys = list(keys)
        self.taps: tuple[str, ...] = ()
        self._recipe = self._load(None)

    def see(self, data: DataPair) -> None:
        """Try the original on the data, before anything is measured, and find the taps for
        attention transfer. UserError if its weights, or the images, are not for it."""
        teacher, facts = self._recipe.teacher, data.facts
        assert teacher is not None and facts.num_classes is not None
        with torch.random.fork_rng(devices=[]):
            if not self.trains:
                load_net(teacher, data, str(self.weights), "teacher")
            model = create_model(self.original.name, facts.num_classes, **self.original.options)
        images_NCHW = torch.zeros(1, *facts.image_shape)
        try:
            with torch.no_grad():
                model.eval()(images_NCHW)
        except Exception as error:  # foreign code can fail in any way
            raise refusal(
                error,
                title=self.original.title,
                model=model,
                run=model,
                images_NCHW=images_NCHW,
                precision=Precision("fp32", "cpu"),
                remedy=of_images(data),
            ) from error
        self.taps = taps_of(model, facts.image_shape)

    def _load(self, epochs: int | None, *, ranking: bool = False) -> Recipe:
        name = self.original.name
        given = [key for key in self.keys if not key.startswith(_NETWORK)]
        words = [f"student.name={name}", f"teacher.name={name}", "teacher.train=false"]
        words += [f"teacher.weights={self.weights}"]
        if self.taps:
            pairs = ", ".join(f"{tap}: {tap}" for tap in self.taps)
            words += [*_AT, f"losses.at.pairs={{{pairs}}}"]
        words += given
        if ranking:
            words.append(f"data.tune_share={RANK_SHARE}")
        recipe = load_recipe("folder", overrides=words)
        if epochs is not None:
            recipe = recipe.over(epochs)
        if not any(key.startswith("eval_epochs=") for key in given):
            recipe = recipe.replace(eval_epochs=recipe.total_epochs)
        assert recipe.teacher is not None
        own = {key: value for key, value in self.original.options.items() if key != "kernels"}
        # Its own weights say what they are of; published or foreign ones do not.
        teacher = recipe.teacher.model_copy(update=_typed(own))
        return recipe.replace(
            teacher=teacher, student=recipe.student.model_copy(update=_typed(own))
        )

    @property
    def recipe(self) -> Recipe:
        """With all keys, for the original as its own student."""
        return self._recipe

    def of_original(self) -> Recipe:
        """Trains the original on the labels alone."""
        return self._recipe.without_teacher("compress/original").replace(
            out=str(self.folder / "runs" / "original")
        )

    def epochs_of(self, stages: int) -> int:
        """Epochs of each of so many trainings that share those of the keys."""
        return max(1, self._recipe.total_epochs // stages)

    def of(
        self,
        student: Student,
        title: str,
        start: Path,
        *,
        epochs: int | None = None,
        seed: int,
        ranking: bool = False,
    ) -> Recipe:
        """Distils a student from the original.

        epochs: by default those of the keys. ranking: evaluated on a share of the training images,
        which is held back.
        """
        recipe = self._load(epochs, ranking=ranking)
        plain = recipe.student.model_dump()
        plain |= dict.fromkeys(("width", "block", "blocks", "depth"))
        plain |= {"name": student.name, **student.options, "weights": str(start)}
        return recipe.replace(
            name=f"compress/{title}",
            student=type(recipe.student).model_validate(plain),
            seed=seed,
            out=str(self.folder / "runs" / title),
        )


def _typed(options: dict[str, Any]) -> dict[str, Any]:
    """As the sections of a recipe hold them."""
    return {k: tuple(one) if isinstance(one, list) else one for k, one in options.items()}
