"""The classifier of a network: found by its shapes, replaced, or trained alone.

`fastkd.models.registry` uses it for new heads, `fastkd.teachers.loading` to freeze all but the
head, and `fastkd.training.step` to keep frozen parts in evaluation mode.
"""

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from fastkd.errors import UserError
from fastkd.models.card import Card, card_of, sign

__all__ = ["class_layers", "freeze_backbone", "has_frozen_backbone", "keep_frozen_still"]


def class_layers(model: nn.Module, other: nn.Module) -> tuple[str, ...]:
    """Paths of the layers whose own parameters have other shapes in `other`.

    If `other` is the same network for another number of classes, these are its classifiers;
    some networks have several (auxiliary ones, or one for a distillation token).
    """
    shapes = {path: _shapes(module) for path, module in other.named_modules()}
    return tuple(
        path
        for path, module in model.named_modules()
        if path in shapes and _shapes(module) != shapes[path]
    )


def freeze_backbone(model: nn.Module, classifier: Iterable[str]) -> None:
    """Train only the layers at these paths: a linear probe.

    The parameters of all others get no gradient, so that no graph is built through them, and in
    fastkd's trainer they run as in evaluation: batch norm uses its running statistics and does
    not change them, dropout does nothing. (In your own loop call `keep_frozen_still` after every
    `model.train()`.)

    Raises:
        UserError: there is no such layer, or it has nothing to train.
    """
    classifier = tuple(classifier)
    known = dict(model.named_modules())
    for path in classifier:
        if path not in known or not any(True for _ in known[path].parameters()):
            raise UserError(f"{type(model).__name__} has no layer {path!r} with weights to train")
    model.requires_grad_(False)
    for path in classifier:
        known[path].requires_grad_(True)
    sign(model, replace(card_of(model) or Card(), trained=classifier))


def has_frozen_backbone(model: nn.Module) -> bool:
    """Whether `freeze_backbone` left only some layers of this network to be trained."""
    card = card_of(model)
    return card is not None and card.trained is not None


def keep_frozen_still(model: nn.Module) -> None:
    """Put all but the trained layers of a network whose backbone is frozen into evaluation mode."""
    card = card_of(model)
    if card is None or card.trained is None:
        return
    modes = {path: model.get_submodule(path).training for path in card.trained}
    model.eval()
    for path, mode in modes.items():
        model.get_submodule(path).train(mode)


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
