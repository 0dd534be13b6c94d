"""What the user names, opened for measuring: a network by name, a run, a weight file, FILE.onnx."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.deploy.latency.backends import Subject
from fastkd.deploy.latency.runtime import Refused, own_size, session
from fastkd.deploy.source import usual_size
from fastkd.errors import UserError
from fastkd.models import create_model
from fastkd.models.blocks.genotype import genotype_in_words
from fastkd.models.card import title_of
from fastkd.models.registry import is_of_zoo, model_from_file
from fastkd.models.rewrite.options import GENOTYPE
from fastkd.storage.description import facts_of
from fastkd.storage.weight_file import WeightFile

__all__ = ["open_subject", "size_of"]

CLASSES = 100
"""Of a network of the zoo for which nobody says how many; `fastkd models` counts with as many."""


def open_subject(
    what: str,
    folder: Path,
    *,
    weights: str | None = None,
    classes: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Subject:
    """The network or the file. UserError if there is none.

    what: name for `create_model`, folder of a run, weight file of fastkd, or FILE.onnx. folder:
        for files that are written on the way. options: of `create_model`, for a name.
    """
    path = Path(what)
    by_name = weights is not None or classes is not None or bool(options)
    if path.suffix == ".onnx":
        if by_name:
            raise UserError(
                f"{what} is a whole network: leave out --weights, --classes and student keys"
            )
        if not path.is_file():
            raise UserError(f"{what}: no such file")
        return Subject(path.name, folder, file=path)
    if path.exists() and not is_of_zoo(what):
        if by_name:
            raise UserError(
                f"{what} says itself what it is: leave out --weights, --classes and student keys"
            )
        model = model_from_file(WeightFile.open(path))
    else:
        model = _by_name(what, weights, classes, options or {})
    title = " ".join([_title(what, model), *_in_words(options or {})])
    return Subject(title, folder, model=model.eval())


def _by_name(
    name: str, weights: str | None, classes: int | None, options: Mapping[str, Any]
) -> nn.Module:
    if weights is None:
        if classes is None and ":" not in name:
            classes = CLASSES
        return create_model(name, classes, **options)
    file = WeightFile.open(weights)
    if classes is None and not options and file.network.architecture in (name, f"simkd:{name}"):
        return model_from_file(file)
    if classes is None and file.network.num_classes is None and ":" not in name:
        raise UserError(f"{weights} does not say how many classes its network has: set --classes")
    return create_model(name, classes, weights=file, **options)


def _in_words(options: Mapping[str, Any]) -> list[str]:
    """For a title: `width=0.5`, `{layer1: G(4)} depth 5-3-5`."""
    plain = [f"{key}={one}" for key, one in options.items() if key not in GENOTYPE]
    genotype = genotype_in_words(options.get("blocks"), options.get("depth"))
    return [*plain, genotype] if genotype else plain


def _title(what: str, model: nn.Module) -> str:
    name = title_of(model)
    return name if name == what else f"{name} ({what})"


def size_of(subject: Subject, asked: tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width to measure with: as asked, else the network's own; None if not known."""
    if asked is not None:
        return asked
    if subject.file is not None:
        try:
            with session(subject.file, "ort-cpu", 1, optimized=False) as opened:
                return own_size(opened)
        except Refused as error:
            raise UserError(f"{subject.title}: {error}") from error
    assert subject.model is not None
    return usual_size(subject.model, facts_of(subject.model))
