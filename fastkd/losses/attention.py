"""AT: attention transfer, the maps of where the networks look.

Zagoruyko and Komodakis 2017, arXiv:1612.03928.
"""

from torch import Tensor
from typing_extensions import override

from fastkd.kernels import AttentionForm, attention_loss
from fastkd.losses.base.arguments import Weight
from fastkd.losses.base.pairs import Pairs, PairTerm
from fastkd.losses.base.term import BindContext

__all__ = ["AT"]


class AT(PairTerm):
    """Attention transfer: sum over pairs of the difference between attention maps.

        a = mean over channels of map^2, over its pixels of length 1
        mean_square:  loss = mean of (a_student - a_teacher)^2
        distance:     loss = mean over images of |a_student - a_teacher|

    `pairs` maps a tap of the student to a tap of the teacher, zoo taps or module paths. Where the
    sizes differ the larger map is average-pooled to the smaller. `form` is passed to
    `fastkd.kernels.attention_loss`: "mean_square", which the released code of AT, RepDistiller and
    Moonshine computes, or "distance", the norm in equation 2 of the papers; their beta is then
    twice the weight.

    Args:
        form: mean_square as the released codes, or distance as equation 2 (weight is then beta /
            2).

    Source: Zagoruyko and Komodakis 2017, arXiv:1612.03928, Eq. 2; szagoruyko/attention-transfer
    utils.py and HobbitLong/RepDistiller distiller_zoo/AT.py.
    Needs: pairs of taps on x, maps; in the reference all stages.
    Weight: 1000, RepDistiller's.
    Tests: tests/training/test_trainer.py, tests/losses/test_terms_on_ranks.py,
    tests/ops/test_attention_map.py; oracle attention_oracle.json.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        weight: Weight = 1000.0,
        form: AttentionForm = "mean_square",
        name: str = "at",
    ) -> None:
        super().__init__(name, pairs, weight)
        self.form: AttentionForm = form

    @override
    def bind(self, context: BindContext) -> None:
        """Refuse taps that are not feature maps."""
        self.map_shapes(context)

    @override
    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        return attention_loss(student, teacher, form=self.form)
