"""Losses on feature maps as terms of a recipe.

AT: Zagoruyko and Komodakis 2017, arXiv:1612.03928.
"""

from collections.abc import Mapping

import torch
from pydantic import PositiveFloat

from fastkd.errors import UserError
from fastkd.kernels import AttentionForm, attention_loss
from fastkd.losses.registry import TermConfig
from fastkd.losses.term import BindContext, LossTerm, TermInputs, TermOutput

__all__ = ["AT", "ATConfig"]


class AT(LossTerm):
    """Attention transfer: sum over pairs of the difference between attention maps.

        a = mean over channels of map^2, over its pixels of length 1
        mean_square:  loss = mean of (a_student - a_teacher)^2
        distance:     loss = mean over images of |a_student - a_teacher|

    `pairs` maps a tap of the student to a tap of the teacher, zoo taps or module paths. Where the
    sizes differ the larger map is average-pooled to the smaller. `form` is that of
    `fastkd.kernels.attention_loss`: "mean_square", which the released code of AT, RepDistiller and
    Moonshine computes, or "distance", the norm in equation 2 of the papers, whose beta is twice the
    weight then.

    Source: Zagoruyko and Komodakis 2017, arXiv:1612.03928, Eq. 2; szagoruyko/attention-transfer
    utils.py and HobbitLong/RepDistiller distiller_zoo/AT.py.
    Needs: pairs of taps on x, maps; in the reference all stages.
    Weight: 1000, RepDistiller's.
    Tests: tests/test_trainer.py, tests/ops/test_attention_map.py; oracle attention_oracle.json.
    """

    def __init__(
        self,
        pairs: Mapping[str, str],
        *,
        weight: float = 1000.0,
        form: AttentionForm = "mean_square",
        name: str = "at",
    ):
        if not pairs:
            raise ValueError("AT needs at least one pair, e.g. pairs={'stage2': 'stage2'}")
        self_needs = [n for s, t in pairs.items() for n in (f"x/student/{s}", f"x/teacher/{t}")]
        super().__init__(name, tuple(self_needs), {name: weight})
        self.pairs = tuple(pairs.items())
        self.form: AttentionForm = form

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
        losses = [
            attention_loss(
                inputs.tensors[f"x/student/{student_tap}"],
                inputs.tensors[f"x/teacher/{teacher_tap}"],
                form=self.form,
            )
            for student_tap, teacher_tap in self.pairs
        ]
        return TermOutput({self.name: torch.stack(losses).sum()})


class ATConfig(TermConfig):
    """Keys of `losses.at`."""

    weight: PositiveFloat
    """Factor in the total; RepDistiller uses 1000."""
    pairs: dict[str, str]
    """Tap of the student: tap of the teacher, e.g. {stage1: stage1, stage2: stage2}."""
    form: AttentionForm = "mean_square"
    """mean_square as the released codes, or distance as equation 2 (weight is then beta / 2)."""

    def build(self, name: str) -> LossTerm:
        """The term."""
        return AT(self.pairs, weight=self.weight, form=self.form, name=name)
