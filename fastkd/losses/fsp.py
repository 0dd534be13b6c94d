"""FSP: how a network's channels correlate from one tap to the next.

Shape suffixes: N images, A and B channels of a tap and of the next one, P = H * W pixels.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated

import torch
from annotated_types import MinLen
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fastkd.errors import UserError
from fastkd.losses.base.arguments import Weight
from fastkd.losses.base.dtypes import widened
from fastkd.losses.base.pairs import PairTerm, pool_alike
from fastkd.losses.base.term import BindContext, TermInputs, TermOutput

__all__ = ["FSP"]


class FSP(PairTerm):
    """Flow of the solution procedure: products of the channels of two consecutive taps.

        G_ab = mean over pixels of (channel a of a tap) * (channel b of the next tap)
        loss = sum over consecutive taps of mean over images, a and b of (G_student - G_teacher)^2

    `pairs` name the taps in the order in which the networks compute them, at least two; each tap of
    the student has as many channels as its partner. Inside a network the larger of two consecutive
    maps is average-pooled to the smaller; student and teacher may differ in size. The loss
    has no trained parameters.

    Its authors train the student's body with this loss alone first (30 epochs in the reference) and
    then with cross entropy alone. fastkd has no such first stage: here it is added to the other
    losses for the whole run, so expect results to differ from the published ones.

    Args:
        pairs: Tap of the student: tap of the teacher, from the first to the last, e.g. {stem: stem,
            stage1: stage1, stage2: stage2}.

    Source: Yim et al., "A Gift from Knowledge Distillation", CVPR 2017; HobbitLong/RepDistiller
    distiller_zoo/FSP.py, its first stage in HobbitLong/RepDistiller helper/pretrain.py.
    Needs: two or more pairs of taps on x, maps; in the reference the stem and all stages.
    Weight: 50, which the reference's script passes and its code, with this loss alone, ignores.
    Tests: tests/losses/test_fsp.py, test_terms_on_ranks.py; oracle feature_oracle.json.
    """

    pairs_wanted = "compares consecutive taps: give two or more pairs, in the order of the networks"

    def __init__(
        self,
        pairs: Annotated[Mapping[str, str], MinLen(2)],
        *,
        weight: Weight = 50.0,
        name: str = "fsp",
    ) -> None:
        super().__init__(name, pairs, weight)

    @override
    def bind(self, context: BindContext) -> None:
        """Refuse taps that are not feature maps, and pairs whose channel counts differ."""
        for number, (student, teacher) in enumerate(self.map_shapes(context)):
            if student[0] != teacher[0]:
                ours, theirs = self.needs[2 * number : 2 * number + 2]
                raise UserError(
                    f"losses.{self.name} compares channel by channel, but {ours} has {student[0]} "
                    f"channels and {theirs} has {teacher[0]}: pair taps of equal width, or use "
                    f"losses.fitnet, losses.vid or losses.at, which handle different widths"
                )

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """Sum over consecutive taps."""
        students, teachers = zip(*self.features(inputs), strict=True)
        flows = (map(_flow, *zip(*pairwise(maps), strict=True)) for maps in (students, teachers))
        losses = [F.mse_loss(*pair) for pair in zip(*flows, strict=True)]
        return TermOutput({self.name: torch.stack(losses).sum()})


def _flow(map_NAHW: Tensor, next_NBHW: Tensor) -> Tensor:
    """G of the class, [N, A, B], in fp32 or fp64."""
    maps = pool_alike(widened(map_NAHW), widened(next_NBHW))
    map_NAP, next_NBP = (m.flatten(2) for m in maps)
    return map_NAP @ next_NBP.mT / map_NAP.shape[2]
