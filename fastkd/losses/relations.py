"""Losses on the relations between the samples of a batch: SP, PKT, CC and RKD.

Shape suffixes: N samples of the batch, over all ranks where `gather` is set; D features. Maps count
as one row of C * H * W features per sample. Everything is fp32, also under autocast.
"""

import math
from collections.abc import Mapping

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from fastkd.compute.collectives import join_rows
from fastkd.losses.base.arguments import Weight
from fastkd.losses.base.dtypes import widened
from fastkd.losses.base.pairs import POOLED, Pairs, PairTerm
from fastkd.losses.base.term import BindContext, TermInputs, TermOutput

__all__ = ["CC", "PKT", "RKD", "SP"]


class Relation(PairTerm):
    """Base: a loss between two sets of rows [N, D], the student's and the teacher's.

    gather: with several ranks, True lets every rank compare the rows of all ranks, with the same
    result as one process on the joined batch; the batch must be split evenly, as fastkd's loaders
    do. With False each rank compares its own rows, and value and gradient are the mean over the
    ranks. With accumulation the batch is a micro-batch in both cases, which changes the loss.

    Args:
        gather: Compare the samples of all ranks with each other, not only within one rank.
    """

    def __init__(self, name: str, pairs: Mapping[str, str], weight: float, *, gather: bool) -> None:
        super().__init__(name, pairs, weight)
        self.gather = gather

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """Sum over the pairs."""
        if self.gather:
            # In fp32 already: the ranks' gradients are added up in this type.
            joined = {
                need: join_rows(widened(tensor), inputs.rows_of_ranks)
                for need, tensor in inputs.tensors.items()
            }
            inputs = inputs._replace(tensors=joined)
        return super().forward(inputs)

    @override
    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        """One row per sample, in fp32."""
        return self.relate(number, widened(student).flatten(1), widened(teacher).flatten(1))

    def relate(self, number: int, student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        """The loss of pair `number`, 0-dim; the two D may differ."""
        raise TypeError(f"{type(self).__name__} must define relate(number, student, teacher)")


class SP(Relation):
    """Similarity preserving: mean square of row-normalised Gram matrices' difference.

        G = F F^T,   G~_i = G_i / |G_i|,   loss = |G~_teacher - G~_student|^2 / N^2

    Source: Tung and Mori 2019, arXiv:1907.09682, section 3; HobbitLong/RepDistiller
    distiller_zoo/SP.py.
    Needs: pairs of taps on x, in the reference the last stage of each network.
    Weight: 3000, the reference's.
    Tests: tests/losses/test_relations.py, test_relations_on_ranks.py; oracle feature_oracle.json.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        weight: Weight = 3000.0,
        gather: bool = True,
        name: str = "sp",
    ) -> None:
        super().__init__(name, pairs, weight, gather=gather)

    @override
    def relate(self, number: int, student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        student_NN, teacher_NN = (F.normalize(x @ x.T) for x in (student_ND, teacher_ND))
        return (teacher_NN - student_NN).square().mean()


class PKT(Relation):
    """Probabilistic knowledge transfer: divergence of the cosine affinities within the batch.

        c_ij = (1 + cos(f_i, f_j)) / 2,   p_ij = c_ij / sum_j c_ij,
        loss = mean over all N^2 entries of p_teacher log(p_teacher / p_student)

    eps = 1e-7 is added to norms and to both probabilities of the ratio.

    Args:
        pairs: Tap of the student: tap of the teacher.

    Source: Passalis and Tefas 2018, arXiv:1803.10837, section 3; HobbitLong/RepDistiller
    distiller_zoo/PKT.py, which takes a mean instead of the paper's sum.
    Needs: pairs of taps on x, by default the pooled vectors.
    Weight: 30000, the reference's.
    Tests: tests/losses/test_relations.py, test_relations_on_ranks.py; oracle feature_oracle.json.
    """

    def __init__(
        self,
        pairs: Pairs = POOLED,
        *,
        weight: Weight = 30000.0,
        gather: bool = True,
        name: str = "pkt",
    ) -> None:
        super().__init__(name, pairs, weight, gather=gather)

    @override
    def relate(self, number: int, student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        eps = 1e-7

        def affinity(rows_ND: Tensor) -> Tensor:
            unit_ND = rows_ND / (torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True) + eps)
            cosine_NN = (1 + unit_ND @ unit_ND.T) / 2
            return cosine_NN / cosine_NN.sum(1, keepdim=True)

        student_NN, teacher_NN = affinity(student_ND), affinity(teacher_ND)
        return (teacher_NN * ((teacher_NN + eps) / (student_NN + eps)).log()).mean()


class CC(Relation):
    """Correlation congruence in its released form, between neighbours of the batch.

        d_i = |A f_student_i + a - B f_teacher_i - b|,
        loss = mean over i < N of sum_c d_ic d_(i+1)c

    A, a, B, b are linear maps to `dim` features and all trained, the teacher's too. A batch of one
    sample has no neighbours and costs 0.

    Args:
        pairs: Tap of the student: tap of the teacher.
        dim: Features of the trained linear maps.

    Source: Peng et al. 2019, arXiv:1904.01802, section 3, whose kernel matrices the released code
    replaces by this product; HobbitLong/RepDistiller distiller_zoo/CC.py.
    Needs: pairs of taps on x, by default the pooled vectors.
    Weight: 0.02, the reference's.
    Tests: tests/losses/test_relations.py, test_relations_on_ranks.py; oracle feature_oracle.json.
    """

    def __init__(
        self,
        pairs: Pairs = POOLED,
        *,
        weight: Weight = 0.02,
        dim: PositiveInt = 128,
        gather: bool = True,
        name: str = "cc",
    ) -> None:
        super().__init__(name, pairs, weight, gather=gather)
        self.dim = dim

    @override
    def bind(self, context: BindContext) -> None:
        """Make the linear maps of both networks."""
        shapes = self.shapes(context)
        self.embed_student = nn.ModuleList(nn.Linear(math.prod(s), self.dim) for s, _ in shapes)
        self.embed_teacher = nn.ModuleList(nn.Linear(math.prod(t), self.dim) for _, t in shapes)

    @override
    def relate(self, number: int, student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        student_ND = self.embed_student[number](student_ND)
        apart_ND = (student_ND - self.embed_teacher[number](teacher_ND)).abs()
        return (apart_ND[:-1] * apart_ND[1:]).sum() / max(len(apart_ND) - 1, 1)


class RKD(Relation):
    """Relational knowledge distillation: distances within pairs and angles within triples.

        distance: h(d_ij / mean d),  d_ij = |f_i - f_j|, the mean over positive distances
        angle:    h(<e_ij, e_ik>),   e_ij = (f_i - f_j) / d_ij
        loss = distance_weight * mean over all N^2 + angle_weight * mean over all N^3

    h is the smooth L1 distance (beta 1) between student and teacher. Holds N^2 (N + D) numbers.

    Args:
        pairs: Tap of the student: tap of the teacher.
        distance_weight: Factor of the distances inside the loss.
        angle_weight: Factor of the angles inside the loss.

    Source: Park et al. 2019, arXiv:1904.05068, section 3.2; HobbitLong/RepDistiller
    distiller_zoo/RKD.py.
    Needs: pairs of taps on x, by default the pooled vectors.
    Weight: 1, inside it 25 and 50, the reference's.
    Tests: tests/losses/test_relations.py, test_relations_on_ranks.py; oracle feature_oracle.json.
    """

    def __init__(
        self,
        pairs: Pairs = POOLED,
        *,
        weight: Weight = 1.0,
        distance_weight: NonNegativeFloat = 25.0,
        angle_weight: NonNegativeFloat = 50.0,
        gather: bool = True,
        name: str = "rkd",
    ) -> None:
        super().__init__(name, pairs, weight, gather=gather)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    @override
    def relate(self, number: int, student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        distances, angles = zip(*map(_geometry, (student_ND, teacher_ND)), strict=True)
        distance = F.smooth_l1_loss(*distances)
        return self.distance_weight * distance + self.angle_weight * F.smooth_l1_loss(*angles)


def _geometry(rows_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [N, N] in units of their mean, and cosines [N, N, N] of the angles at i."""
    # Differences, not a Gram matrix: for nearly equal rows it would leave only rounding errors.
    apart_NND = rows_ND[:, None] - rows_ND
    distance_NN = torch.linalg.vector_norm(apart_NND, dim=2)
    positive_NN = distance_NN > 0
    # Where rows coincide the direction is 0, and so is its gradient.
    unit_NND = apart_NND / torch.where(positive_NN, distance_NN, 1.0)[:, :, None]
    mean = distance_NN.sum() / positive_NN.sum().clamp(min=1)
    return distance_NN / torch.where(mean > 0, mean, 1.0), unit_NND @ unit_NND.mT
