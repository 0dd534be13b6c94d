"""Base of the losses that compare a tensor of the student with one of the teacher, pair by pair.

`losses.relations`, `hints`, `nst`, `fsp`, `factors`, `crd` and `jointrd` build on it.
"""

from collections.abc import Mapping

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from fastkd.errors import UserError
from fastkd.losses.base.registry import TermConfig
from fastkd.losses.base.term import BindContext, LossTerm, TermInputs, TermOutput

__all__ = ["POOLED", "PairConfig", "PairTerm", "pool_alike"]

Shape = tuple[int, ...]
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
    """Sum over pairs of taps of what `compare` makes of one pair. Part: `<name>`.

    Args:
        name: of the term and of its one part.
        pairs: tap of the student to tap of the teacher, zoo taps or module paths; both on x.
        weight: factor in the total.
    """

    def __init__(self, name: str, pairs: Mapping[str, str], weight: float) -> None:
        if not isinstance(pairs, Mapping):
            raise TypeError(
                f"{name}: got pairs={pairs!r}; expected a mapping from taps of the student to taps "
                f"of the teacher, such as {{'stage2': 'stage2'}}"
            )
        if not pairs:
            raise ValueError(f"{name} needs at least one pair, e.g. pairs={{'stage2': 'stage2'}}")
        needs = [need for s, t in pairs.items() for need in (f"x/student/{s}", f"x/teacher/{t}")]
        super().__init__(name, tuple(needs), {name: weight})

    def shapes(self, context: BindContext) -> list[tuple[Shape, Shape]]:
        """Per pair the shapes of student and teacher without the batch axis."""
        shapes = [context.shapes[need] for need in self.needs]
        return list(zip(shapes[::2], shapes[1::2], strict=True))

    def map_shapes(self, context: BindContext) -> list[tuple[Shape, Shape]]:
        """`shapes`, each [C, H, W]; UserError names the tap that is no feature map."""
        for need in self.needs:
            if len(context.shapes[need]) != 3:
                raise UserError(
                    f"losses.{self.name} compares maps [C, H, W], but {need} is "
                    f"{list(context.shapes[need])} per image: name a stage in its pairs"
                )
        return self.shapes(context)

    def features(self, inputs: TermInputs) -> list[tuple[Tensor, Tensor]]:
        """Per pair the tensors of student and teacher."""
        features = [inputs.tensors[need] for need in self.needs]
        return list(zip(features[::2], features[1::2], strict=True))

    def forward(self, inputs: TermInputs) -> TermOutput:
        """Sum over the pairs."""
        losses = [self.compare(number, *pair) for number, pair in enumerate(self.features(inputs))]
        return TermOutput({self.name: torch.stack(losses).sum()})

    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of pair `number`, 0-dim, of tensors in the networks' own type."""
        raise TypeError(f"{type(self).__name__} must define compare(number, student, teacher)")


class PairConfig(TermConfig):
    """Keys that all losses on pairs of taps have."""

    weight: PositiveFloat
    """Factor in the total."""
    pairs: dict[str, str] = Field(min_length=1)
    """Tap of the student: tap of the teacher, e.g. {stage1: stage1, stage2: stage2}."""
