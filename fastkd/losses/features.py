"""Losses on feature maps as terms of a recipe.

AT: Zagoruyko & Komodakis, arXiv:1612.03928; the form and the weight 1000 of RepDistiller.
"""

from collections.abc import Mapping

from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from fastkd.errors import UserError
from fastkd.losses.registry import TermConfig
from fastkd.losses.term import BindContext, LossTerm, TermInputs, TermOutput

__all__ = ["AT", "ATConfig", "attention_map"]


def attention_map(features_NCHW: Tensor) -> Tensor:
    """Mean over channels of the square, L2-normalised over an image's pixels: [N, H*W], fp32."""
    return F.normalize(features_NCHW.float().square().mean(dim=1).flatten(1))


class AT(LossTerm):
    """Attention transfer: sum over pairs of the mean squared difference of attention maps.

    `pairs` maps a tap of the student to a tap of the teacher, zoo taps or module paths. Where the
    sizes differ the larger map is average-pooled to the smaller.
    """

    def __init__(self, pairs: Mapping[str, str], *, weight: float = 1000.0, name: str = "at"):
        if not pairs:
            raise ValueError("AT needs at least one pair, e.g. pairs={'stage2': 'stage2'}")
        self_needs = [n for s, t in pairs.items() for n in (f"x/student/{s}", f"x/teacher/{t}")]
        super().__init__(name, tuple(self_needs), {name: weight})
        self.pairs = tuple(pairs.items())

    def bind(self, context: BindContext) -> None:
        """Refuse taps that are no feature maps."""
        for need in self.needs:
            if len(context.shapes[need]) != 3:
                raise UserError(
                    f"losses.{self.name} compares maps [C, H, W], but {need} is "
                    f"{list(context.shapes[need])} per image: name a stage in its pairs"
                )

    def forward(self, inputs: TermInputs) -> TermOutput:
        """Sum over the pairs."""
        total = None
        for student_tap, teacher_tap in self.pairs:
            student_NCHW = inputs.tensors[f"x/student/{student_tap}"]
            teacher_NCHW = inputs.tensors[f"x/teacher/{teacher_tap}"]
            size = (
                min(student_NCHW.shape[2], teacher_NCHW.shape[2]),
                min(student_NCHW.shape[3], teacher_NCHW.shape[3]),
            )
            maps = [
                attention_map(m if m.shape[2:] == size else F.adaptive_avg_pool2d(m.float(), size))
                for m in (student_NCHW, teacher_NCHW)
            ]
            loss = (maps[0] - maps[1]).square().mean()
            total = loss if total is None else total + loss
        assert total is not None
        return TermOutput({self.name: total})


class ATConfig(TermConfig):
    """Keys of `losses.at`."""

    weight: PositiveFloat
    """Factor in the total; RepDistiller uses 1000."""
    pairs: dict[str, str]
    """Tap of the student: tap of the teacher, e.g. {stage1: stage1, stage2: stage2}."""

    def build(self, name: str) -> LossTerm:
        """The term."""
        return AT(self.pairs, weight=self.weight, name=name)
