"""CRD: contrastive representation distillation, with a memory bank of every training sample.

Shape suffixes: N rows of this rank's batch, M samples of the training set, D features of the
embedding, K negatives, G rows of all ranks.
"""

import math
from collections.abc import Mapping
from typing import Annotated

import torch
from annotated_types import Ge, Lt, MaxLen, MinLen
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from fastkd.compute.collectives import join_rows
from fastkd.errors import UserError
from fastkd.losses.base.arguments import Weight
from fastkd.losses.base.dtypes import autocast_like, widened
from fastkd.losses.base.pairs import POOLED, PairTerm
from fastkd.losses.base.term import BindContext, TermInputs, TermOutput

__all__ = ["CRD"]


class CRD(PairTerm):
    """Distinguish a sample's own feature in the other network's bank from other classes' features.

        v = embedded and of length 1, m = rows of the bank, q_j = exp(v . m_j / temperature) / Z,
        loss = -mean over rows of [log q_own / (q_own + c + eps) + sum_j log c / (q_j + c + eps)]

    with c = K / M, eps = 1e-7, once with the student's v against the teacher's bank and once the
    other way round, added. The embeddings are linear and both trained. The K negatives of a row
    are drawn without replacement from all samples of other classes, anew in each step. Z is M times
    the mean exponential of the first batch, one per direction, and then fixed. Scores use the banks
    from before the step; a good step then updates the rows of its batch: normalise(momentum * old +
    (1 - momentum) * v).

    Several ranks are always joined: they hold the same banks and Z, computed from the rows of all
    ranks. Value and update equal those of one process with the joined batch, except that each rank
    draws its own negatives. There is no gather=false: rows are compared with the bank, not with
    each other, so for given banks and Z the loss of a rank's rows is the same either way. Banks
    written by one rank alone would diverge, and a checkpoint, which keeps one copy, could not
    resume the others. With accumulation Z comes from the first micro-batch. Banks take 8 M D bytes.
    A step holds several N x M matrices: it multiplies with the whole bank and picks from the
    products.

    Args:
        pairs: Tap of the student: tap of the teacher; one pair.
        dim: Features of the trained linear maps and of the banks.
        negatives: Samples of other classes per image.
        temperature: Divides the products of unit vectors.
        momentum: Share of the old row that stays in the bank.

    Source: Tian et al. 2020, arXiv:1910.10699, Eq. 18; HobbitLong/RepDistiller crd/memory.py and
    HobbitLong/RepDistiller crd/criterion.py.
    Needs: one pair of taps on x, by default the pooled vectors, and the ids of the samples.
    Weight: 0.8, the reference's.
    Tests: tests/losses/test_crd.py, test_relations_on_ranks.py; oracle feature_oracle.json.
    """

    # The labels, too, need no copy in advance and no broadcast in every step.
    banks = ("student_MD", "teacher_MD", "normalizer_2", "labels_M")
    uses_index = True
    pairs_wanted = "has one bank per network: give one pair"
    label_kind = "class"
    student_MD: Tensor
    teacher_MD: Tensor
    normalizer_2: Tensor
    """Z of the student's and of the teacher's rows; 0 before the first good step."""
    labels_M: Tensor

    def __init__(
        self,
        pairs: Annotated[Mapping[str, str], MinLen(1), MaxLen(1)] = POOLED,
        *,
        weight: Weight = 0.8,
        dim: PositiveInt = 128,
        negatives: PositiveInt = 16384,
        temperature: PositiveFloat = 0.07,
        momentum: Annotated[float, Ge(0), Lt(1)] = 0.5,
        name: str = "crd",
    ) -> None:
        super().__init__(name, pairs, weight)
        self.dim, self.negatives = dim, negatives
        self.temperature, self.momentum = temperature, momentum

    @override
    def bind(self, context: BindContext) -> None:
        """Make embeddings and banks; UserError if there are too few samples of other classes."""
        num, labels_M = context.num_samples, context.train_labels_N
        others = num - int(torch.bincount(labels_M).max())
        if self.negatives > others:
            raise UserError(
                f"losses.{self.name}.negatives={self.negatives}, but a class has only {others} "
                f"training samples of other classes: set it to at most {others}"
            )
        ((student, teacher),) = self.shapes(context)
        self.embed_student = nn.Linear(math.prod(student), self.dim)
        self.embed_teacher = nn.Linear(math.prod(teacher), self.dim)
        side = math.sqrt(3 / self.dim)
        for bank in ("student_MD", "teacher_MD"):
            self.register_buffer(bank, torch.empty(num, self.dim).uniform_(-side, side))
        self.register_buffer("normalizer_2", torch.zeros(2))
        self.register_buffer("labels_M", labels_M, persistent=False)

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """The carry holds the updates from the rows of all ranks."""
        student, teacher = (tensor.flatten(1) for tensor in self.wanted(inputs))
        with autocast_like(student):
            student, teacher = self.embed_student(student), self.embed_teacher(teacher)
        student_ND, teacher_ND = F.normalize(widened(student)), F.normalize(widened(teacher))
        own_N1 = inputs.index_N[:, None]
        picked_NK = torch.cat([own_N1, self.draw_negatives(inputs.labels_N)], dim=1)
        scores = [
            # The picked rows themselves, [N, K + 1, D], would take more memory than all products.
            (anchor_ND @ bank_MD.T).gather(1, picked_NK).div(self.temperature).exp()
            for anchor_ND, bank_MD in (
                (student_ND, self.teacher_MD),
                (teacher_ND, self.student_MD),
            )
        ]
        mean_N2 = torch.stack([score_NK.mean(1) for score_NK in scores], dim=1)
        rows_of_ranks = inputs.rows_of_ranks
        row_GX = join_rows(torch.cat([student_ND, teacher_ND, mean_N2], 1).detach(), rows_of_ranks)
        now_2 = row_GX[:, -2:].mean(0) * len(self.labels_M)
        z_2 = torch.where(self.normalizer_2 > 0, self.normalizer_2, now_2)
        losses = [self.contrast(score_NK / z) for score_NK, z in zip(scores, z_2, strict=True)]
        carry = {
            "student": row_GX[:, : self.dim],
            "teacher": row_GX[:, self.dim : -2],
            "normalizer": now_2,
            "index": join_rows(inputs.index_N, rows_of_ranks),
        }
        return TermOutput({self.name: torch.stack(losses).sum()}, carry)

    def draw_negatives(self, labels_N: Tensor) -> Tensor:
        """Ids of K different samples of other classes for each row, all subsets equally likely."""
        key_NM = torch.rand(len(labels_N), len(self.labels_M), device=labels_N.device)
        key_NM = key_NM.masked_fill(self.labels_M == labels_N[:, None], 2.0)
        return key_NM.topk(self.negatives, dim=1, largest=False, sorted=False).indices

    def contrast(self, q_NK: Tensor) -> Tensor:
        """The loss of one direction; the first column is the row's own sample."""
        c, eps = self.negatives / len(self.labels_M), 1e-7
        # log1p: q is far below c, and log(c / (q + c)) would round most of it away.
        own_N = ((c + eps) / q_NK[:, 0]).log1p()
        return (own_N + ((q_NK[:, 1:] + eps) / c).log1p().sum(1)).mean()

    @override
    def commit(self, carry: Mapping[str, Tensor], index_N: Tensor, ok: Tensor) -> None:
        """Move the banks' rows of all ranks; keep the first Z."""
        index_G = carry["index"]
        # A sampler may pad with repeated ids: the first row counts, in whatever order they are
        # written.
        first_G = (index_G[:, None] == index_G).int().argmax(1)
        for bank_MD, key in ((self.student_MD, "student"), (self.teacher_MD, "teacher")):
            old_GD = bank_MD[index_G]
            moved_GD = self.momentum * old_GD + (1 - self.momentum) * carry[key][first_G]
            bank_MD[index_G] = torch.where(ok, F.normalize(moved_GD), old_GD)
        first = ok & (self.normalizer_2 == 0)
        self.normalizer_2.copy_(torch.where(first, carry["normalizer"], self.normalizer_2))
