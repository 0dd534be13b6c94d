"""DIST: correlation with the teacher within rows and within columns, as a term of a recipe.

Huang et al. 2022, arXiv:2205.10536.
"""

from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from fastkd.compute.collectives import join_rows
from fastkd.losses.base.registry import TermConfig
from fastkd.losses.base.term import LossTerm, TermInputs, TermOutput, check_numbers, widened

__all__ = ["DIST", "DISTConfig", "between_rows"]

EPS = 1e-8
"""Added to the product of the norms, as in the reference."""


class DIST(LossTerm):
    """Correlation with the teacher's probabilities at T, within samples and within classes.

        inter = mean over samples of 1 - Pearson(p_student_n, p_teacher_n), over classes
        intra = mean over classes of 1 - Pearson(p_student_c, p_teacher_c), over samples
        loss = T^2 (inter + intra)

    The total of the paper is cross entropy + 2 * DIST; T is 4 on CIFAR and 1 on ImageNet.

    Under several ranks `gather=True` takes the columns over the samples of all ranks, which is one
    process on the joined batch; otherwise each rank takes its own, and their mean counts.

    Source: Huang et al. 2022, arXiv:2205.10536, section 4; hunto/image_classification_sota
    lib/models/losses/dist_kd.py.
    Needs: the logits of both networks on `view`.
    Weight: 2, the paper's.
    Tests: tests/losses/test_logit_losses.py, test_peer_losses.py, test_ranks.py; oracles
    logit_losses.json, peer_losses.json (the authors' code).
    """

    def __init__(
        self,
        *,
        weight: float = 2.0,
        temperature: float = 4.0,
        gather: bool = True,
        view: str = "x",
        name: str = "dist",
    ) -> None:
        super().__init__(name, (f"{view}/student/logits", f"{view}/teacher/logits"), {name: weight})
        check_numbers(name, above=0, temperature=temperature)
        self.temperature = temperature
        self.gather = gather

    def forward(self, inputs: TermInputs) -> TermOutput:
        """Softmax in fp32 whatever the autocast type."""
        student_NC, teacher_NC = (
            (widened(inputs.tensors[need]) / self.temperature).softmax(1) for need in self.needs
        )
        inter = between_rows(student_NC, teacher_NC)
        if self.gather:
            student_NC = join_rows(student_NC, inputs.rows_of_ranks)
            teacher_NC = join_rows(teacher_NC, inputs.rows_of_ranks)
        intra = between_rows(student_NC.T, teacher_NC.T)
        return TermOutput({self.name: self.temperature**2 * (inter + intra)})


def between_rows(student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
    """Mean over rows of 1 - Pearson's correlation of two [N, C] tensors, a scalar."""
    s_NC = student_NC - student_NC.mean(1, keepdim=True)
    t_NC = teacher_NC - teacher_NC.mean(1, keepdim=True)
    norms_N = torch.linalg.vector_norm(s_NC, dim=1) * torch.linalg.vector_norm(t_NC, dim=1)
    return (1 - (s_NC * t_NC).sum(1) / (norms_N + EPS)).mean()


class DISTConfig(TermConfig):
    """Keys of `losses.dist`."""

    weight: PositiveFloat
    """Factor in the total; the paper uses 2."""
    temperature: PositiveFloat = 4.0
    """T of both softmaxes."""
    gather: bool = True
    """Correlate each class over the samples of all ranks, not of one."""
    view: Literal["x", "xprime"] = "x"
    """View on which the logits are compared."""

    def build(self, name: str) -> LossTerm:
        """The term."""
        return DIST(name=name, **self.model_dump())
