"""NST: neuron selectivity transfer, the distance between two sets of channel maps.

Shape suffixes: N images, C channels, P = H * W pixels.
"""

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fastkd.losses.base.arguments import Weight
from fastkd.losses.base.dtypes import widened
from fastkd.losses.base.pairs import Pairs, PairTerm, pool_alike
from fastkd.losses.base.term import BindContext

__all__ = ["NST"]


class NST(PairTerm):
    """Maximum mean discrepancy between the channels of student and teacher, per image.

        a_c = channel c over its pixels, of length 1,   K(a, b) = (a . b)^2,
        loss = mean K(teacher, teacher) + mean K(student, student) - 2 mean K(student, teacher)

    Means over images and over all pairs of channels, whose numbers may differ. Where the sizes
    differ the larger map is average-pooled.

    Source: Huang and Wang 2017, arXiv:1707.01219, section 4, with the polynomial kernel of degree 2
    and offset 0; HobbitLong/RepDistiller distiller_zoo/NST.py, which holds N * C * C * P numbers
    where this one holds matrices of N * min(C, P)^2.
    Needs: pairs of taps on x, maps; in the reference all stages.
    Weight: 50, the reference's.
    Tests: tests/losses/test_nst.py, test_terms_on_ranks.py; oracle feature_oracle.json.
    """

    def __init__(self, pairs: Pairs, *, weight: Weight = 50.0, name: str = "nst") -> None:
        super().__init__(name, pairs, weight)

    @override
    def bind(self, context: BindContext) -> None:
        """Refuse taps that are not feature maps."""
        self.map_shapes(context)

    @override
    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        maps = (widened(m).flatten(2) for m in pool_alike(student, teacher))
        student_NCP, teacher_NCP = (F.normalize(m, dim=2) for m in maps)
        num_student, num_teacher = student_NCP.shape[1], teacher_NCP.shape[1]
        if student_NCP.shape[2] <= max(num_student, num_teacher):
            # sum_ij (s_i . t_j)^2 = <S'S, T'T>, so the three means are one square over P x P.
            student_NPP = student_NCP.mT @ student_NCP / num_student
            teacher_NPP = teacher_NCP.mT @ teacher_NCP / num_teacher
            return (teacher_NPP - student_NPP).square().sum((1, 2)).mean()
        pairs = [(teacher_NCP, teacher_NCP), (student_NCP, student_NCP), (student_NCP, teacher_NCP)]
        same_t, same_s, cross = ((a_NCP @ b_NCP.mT).square().mean() for a_NCP, b_NCP in pairs)
        return same_t + same_s - 2 * cross
