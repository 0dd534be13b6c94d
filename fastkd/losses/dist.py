"""DIST: correlation with the teacher within rows and within columns, as a term of a recipe.

Huang et al. 2022, arXiv:2205.10536.
"""

from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor
from typing_extensions import override

from fastkd.compute.collectives import join_rows
from fastkd.losses.base.arguments import Weight
from fastkd.losses.base.dtypes import as_rows, widened
from fastkd.losses.base.needs import Need, View, both_logits
from fastkd.losses.base.term import LossTerm, TermInputs, TermOutput

__all__ = ["DIST", "between_rows"]

EPS = 1e-8
"""Added to the product of the norms, as in the reference."""


class DIST(LossTerm):
    """Correlation with the teacher's probabilities at T, within samples and within classes.

        inter = mean over samples of 1 - Pearson(p_student_n, p_teacher_n), over classes
        intra = mean over classes of 1 - Pearson(p_student_c, p_teacher_c), over samples
        loss = T^2 (inter + intra)

    The total of the paper is cross entropy + 2 * DIST; T is 4 on CIFAR and 1 on ImageNet. With
    dense logits [N, C, H, W] a sample is a pixel.

    With several ranks, `gather=True` takes the columns over the samples of all ranks, which equals
    one process on the joined batch; otherwise each rank uses its own samples, and the mean over
    ranks counts.

    Args:
        weight: Factor in the total; the paper uses 2.
        temperature: T of both softmaxes.
        gather: Correlate each class over the samples of all ranks instead of one.
        view: View on which the logits are compared.

    Source: Huang et al. 2022, arXiv:2205.10536, section 4; hunto/image_classification_sota
    lib/models/losses/dist_kd.py.
    Needs: the logits of both networks on `view`.
    Weight: 2, the paper's.
    Tests: tests/losses/test_logit_losses.py, test_peer_losses.py, test_terms_on_ranks.py; oracles
    logit_losses.json, peer_losses.json (the authors' code).
    """

    def __init__(
        self,
        *,
        weight: Weight = 2.0,
        temperature: PositiveFloat = 4.0,
        gather: bool = True,
        view: View = "x",
        name: str = "dist",
    ) -> None:
        super().__init__(name, self.needs_of(view=view), {name: weight})
        self.temperature = temperature
        self.gather = gather

    @override
    @classmethod
    def needs_of(cls, *, view: View, **keys: Any) -> tuple[Need, ...]:
        return both_logits(view)

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """Softmax in fp32 whatever the autocast type."""
        student_NC, teacher_NC = (
            (widened(logits_NC) / self.temperature).softmax(1) for logits_NC in self.wanted(inputs)
        )
        inter = between_rows(as_rows(student_NC), as_rows(teacher_NC))
        if self.gather:
            student_NC = join_rows(student_NC, inputs.rows_of_ranks)
            teacher_NC = join_rows(teacher_NC, inputs.rows_of_ranks)
        intra = between_rows(as_rows(student_NC).T, as_rows(teacher_NC).T)
        return TermOutput({self.name: self.temperature**2 * (inter + intra)})


def between_rows(student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
    """Mean over rows of 1 - Pearson's correlation of two [N, C] tensors, a scalar."""
    s_NC = student_NC - student_NC.mean(1, keepdim=True)
    t_NC = teacher_NC - teacher_NC.mean(1, keepdim=True)
    norms_N = torch.linalg.vector_norm(s_NC, dim=1) * torch.linalg.vector_norm(t_NC, dim=1)
    return (1 - (s_NC * t_NC).sum(1) / (norms_N + EPS)).mean()
