"""Data picking: select from a pool of mixed images those where student and teacher differ most.

Flow: `augment` makes x and a pool of x', CutMix (or mixup) of one batch several times over -> the
teacher sees both -> [here] -> the step on x and the chosen x'. "Understanding the Success of
Knowledge Distillation: A Data Augmentation Perspective", section 3.2; what the paper does not say
follows its authors' released code (Good-DA-in-KD): the student scores in training mode, and its
batch norm statistics see the pool. Under DDP every process picks from a pool made of its own share
of the batch, and `ratio` refers to that pool: one process would choose other images.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastkd.compute.precision import Precision
from fastkd.kernels import hardness, select_hardest
from fastkd.models.intake import image_dtype
from fastkd.models.taps import Tapped

__all__ = ["Pick", "PickCriterion", "Picked"]

PickCriterion = Literal["kl", "teacher_entropy", "student_entropy"]
"""The criteria of `fastkd.kernels.hardness` that need no labels."""


class Picked(NamedTuple):
    """The choice from one pool."""

    index_K: Tensor
    """int64 rows of the pool, hardest first."""
    ratio: Tensor
    """Mean score of the chosen rows over the pool's (r of the paper's equation 4), 0-dim."""


class Pick(nn.Module):
    """Scores a pool and chooses from it; compiled as a separate unit.

    criterion: "kl" (teacher against student at `temperature`), or the entropy of either's
    probabilities at temperature 1; the teacher's entropy needs no pass of the student.
    images, share: how many are chosen, as a number (all of a smaller pool, as released) or as a
    share of the pool; the other is None.
    update_statistics: whether the student's batch norm statistics see the pool. Its scores come
    from the pool's own batch statistics either way.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        criterion: PickCriterion,
        temperature: float,
        images: int | None,
        share: float | None,
        update_statistics: bool,
        precision: Precision,
    ) -> None:
        super().__init__()
        self.student = Tapped(student)
        self.criterion: PickCriterion = criterion
        self.temperature = temperature
        self.images, self.share = images, share
        self.update_statistics = update_statistics
        self.precision = precision
        self.image_dtype = image_dtype(student, precision)

    def forward(self, pool_PCHW: Tensor, teacher_logits_PC: Tensor) -> Picked:
        """Choose from a pool that the teacher has seen already."""
        scores_P = self.scores(pool_PCHW, teacher_logits_PC)
        index_K = select_hardest(scores_P, self.num_chosen(len(scores_P))).index
        return Picked(index_K, scores_P[index_K].mean() / scores_P.mean())

    def scores(self, pool_PCHW: Tensor, teacher_logits_PC: Tensor) -> Tensor:
        """Hardness [P] of every image of a pool, fp32, without gradient."""
        with torch.no_grad():
            return hardness(
                None if self.criterion == "teacher_entropy" else self._logits(pool_PCHW),
                teacher_logits_PC,
                criterion=self.criterion,
                temperature=self.temperature,
            )

    def num_chosen(self, num: int) -> int:
        """How many of `num` images are chosen, whatever their scores."""
        if self.share is None:
            return min(self.images or num, num)
        # As `select_hardest` counts: 0.1 of 30 is 3, although the product in floats is above 3.
        return math.ceil(self.share * num - 1e-9)

    def _logits(self, pool_PCHW: Tensor) -> Tensor:
        pool_PCHW = pool_PCHW.to(self.image_dtype)
        with self.precision.autocast():
            if self.update_statistics:
                return self.student(pool_PCHW)["logits"]
            # The pass writes its statistics into copies, which are dropped.
            copies = {name: buffer.clone() for name, buffer in self.student.named_buffers()}
            return torch.func.functional_call(self.student, copies, (pool_PCHW,))["logits"]
