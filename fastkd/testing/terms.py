"""A loss term without a trainer around it: bound to the shapes of given tensors, called on them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastkd.losses.base.term import BindContext, LossTerm, TermInputs, TermOutput

__all__ = ["bind_pair", "bind_term", "call_term", "term_inputs"]


def bind_term(
    term: LossTerm,
    tensors: Mapping[str, Tensor],
    *,
    num_samples: int = 50,
    num_classes: int = 10,
    **context: Any,
) -> LossTerm:
    """Bind a loss to the shapes of its inputs; the training labels cycle through the classes."""
    shapes: dict[str, tuple[int, ...]] = {
        need: tuple(tensors[need].shape[1:]) for need in term.needs
    }
    labels_N = torch.arange(num_samples) % num_classes
    term.bind(BindContext(num_samples, num_classes, labels_N, shapes, **context))
    return term


def term_inputs(
    term: LossTerm,
    tensors: Mapping[str, Tensor],
    labels_N: Tensor | None = None,
    *,
    epoch: float = 0.0,
    rows_of_ranks: tuple[int, ...] = (),
) -> TermInputs:
    """What a step hands to a loss in `epoch`, counted from 0; sample ids are rows of the batch."""
    some = next(iter(tensors.values()))
    labels_N = torch.arange(len(some)) % 10 if labels_N is None else labels_N
    schedule = {
        name: torch.tensor(value(epoch), dtype=some.dtype)
        for name, value in term.schedules().items()
    }
    return TermInputs(tensors, labels_N, torch.arange(len(some)), schedule, rows_of_ranks)


def call_term(
    term: LossTerm,
    tensors: Mapping[str, Tensor],
    labels_N: Tensor | None = None,
    *,
    epoch: float = 0.0,
    rows_of_ranks: tuple[int, ...] = (),
) -> TermOutput:
    """Call a bound loss on its `term_inputs`."""
    return term(term_inputs(term, tensors, labels_N, epoch=epoch, rows_of_ranks=rows_of_ranks))


def bind_pair(term: LossTerm, student: Tensor, teacher: Tensor, **context: Any) -> TermInputs:
    """Bind a loss on one pair of taps to these tensors; its `term_inputs`."""
    tensors: dict[str, Tensor] = dict(zip(term.needs, (student, teacher), strict=True))
    return term_inputs(bind_term(term, tensors, **context), tensors)
