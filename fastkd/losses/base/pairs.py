"""Base of the losses that compare a tensor of the student with one of the teacher, pair by pair.

`losses.relations`, `hints`, `nst`, `fsp`, `factor_transfer`, `crd` and `jointrd` build on it.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from annotated_types import MinLen
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fastkd.errors import UserError
from fastkd.losses.base.arguments import arguments_of, sizes_of
from fastkd.losses.base.needs import Need
from fastkd.losses.base.term import BindContext, LossTerm, TermInputs, TermOutput

__all__ = ["POOLED", "PairTerm", "Pairs", "pool_alike"]

Shape = tuple[int, ...]
Pairs = Annotated[Mapping[str, str], MinLen(1)]
"""Tap of the student to tap of the teacher."""
POOLED = {"pooled": "pooled"}


def pool_alike(student_NCHW: Tensor, teacher_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and width: the larger one is average-pooled."""
    shapes = (student_NCHW.shape[2:], teacher_NCHW.shape[2:])
    size = (min(s[0] for s in shapes), min(s[1] for s in shapes))
    student, teacher = (
        m if m.shape[2:] == size else F.adaptive_avg_pool2d(m, size)
        for m in (student_NCHW, teacher_NCHW)
    )
    return student, teacher


class PairTerm(LossTerm):
    """Sum of `compare` over pairs of taps. Part: `<name>`.

    Taps are zoo taps or module paths; both networks are compared on x.

    Args:
        weight: Factor in the total.
        pairs: Tap of the student: tap of the teacher, e.g. {stage1: stage1, stage2: stage2}.
    """

    pairs_wanted = "needs at least one pair, e.g. pairs={'stage2': 'stage2'}"
    """Error message for a number of pairs that the annotation excludes."""

    def __init__(self, name: str, pairs: Mapping[str, str], weight: float) -> None:
        _check_pairs(type(self), name, pairs)
        super().__init__(name, self.needs_of(pairs=pairs), {name: weight})

    @override
    @classmethod
    def needs_of(cls, *, pairs: Mapping[str, str], **keys: Any) -> tuple[Need, ...]:
        both = ((Need.of("x", "student", s), Need.of("x", "teacher", t)) for s, t in pairs.items())
        return tuple(need for pair in both for need in pair)

    def shapes(self, context: BindContext) -> list[tuple[Shape, Shape]]:
        """Per pair the shapes of student and teacher without the batch axis."""
        shapes = [context.shapes[need] for need in self.needs]
        return list(zip(shapes[::2], shapes[1::2], strict=True))

    def map_shapes(self, context: BindContext) -> list[tuple[Shape, Shape]]:
        """`shapes`, each [C, H, W]; UserError names the tap that is not a feature map."""
        for need in self.needs:
            if len(context.shapes[need]) != 3:
                raise UserError(
                    f"losses.{self.name} compares maps [C, H, W], but {need} is "
                    f"{list(context.shapes[need])} per image: name a stage in its pairs"
                )
        return self.shapes(context)

    def features(self, inputs: TermInputs) -> list[tuple[Tensor, Tensor]]:
        """Per pair the tensors of student and teacher."""
        features = self.wanted(inputs)
        return list(zip(features[::2], features[1::2], strict=True))

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        losses = [self.compare(number, *pair) for number, pair in enumerate(self.features(inputs))]
        return TermOutput({self.name: torch.stack(losses).sum()})

    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of pair `number`, 0-dim, of tensors in the networks' own type."""
        raise TypeError(f"{type(self).__name__} must define compare(number, student, teacher)")


def _check_pairs(term: type[PairTerm], name: str, pairs: object) -> None:
    if not isinstance(pairs, Mapping):
        raise TypeError(
            f"{name}: got pairs={pairs!r}; expected a mapping from taps of the student to taps "
            f"of the teacher, such as {{'stage2': 'stage2'}}"
        )
    declared = arguments_of(term).get("pairs")
    least, most = sizes_of(declared) if declared else (1, math.inf)
    if not least <= len(pairs) <= most:
        raise UserError(f"{name} {term.pairs_wanted}, got {dict(pairs)}")
