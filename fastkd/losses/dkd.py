"""Decoupled knowledge distillation (DKD) as a term of a recipe.

Zhao et al. 2022, arXiv:2203.08679.
"""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fastkd.data.batch import NO_LABEL
from fastkd.errors import UserError
from fastkd.kernels import kd_loss
from fastkd.losses.base.arguments import Weight
from fastkd.losses.base.dtypes import as_rows, widened
from fastkd.losses.base.needs import Need, both_logits
from fastkd.losses.base.schedules import linear_warmup
from fastkd.losses.base.term import BindContext, LossTerm, TermInputs, TermOutput
from fastkd.losses.logits import standardize

__all__ = ["DKD", "decoupled_rows"]


class DKD(LossTerm):
    """KD decoupled into the label's class and the others; add a cross entropy loss to it.

        TCKD = T^2 KL(b_teacher || b_student),  b = (p_y, 1 - p_y) for the label y
        NCKD = T^2 KL(q_teacher || q_student),  q = softmax at T over the other classes
        loss = warmup * mean over rows of (alpha TCKD + beta NCKD)

    Defaults are mdistiller's on CIFAR-100, where beta is 8 for resnet32x4 teachers, resnet50 to
    MobileNetV2 and wrn_40_2 to ShuffleNetV1, but 6 for vgg13 teachers and wrn_40_2 to another wide
    ResNet, and 2 for resnet56 and resnet110 teachers. On ImageNet T is 1 and the warm-up 1 epoch,
    with beta 0.5 for ResNet-34 to ResNet-18 and 2 for ResNet-50 to MobileNetV1. With dense logits
    [N, C, H, W] a row is a pixel, and those labelled -100 do not count. `standardize` takes
    both logits to zero mean and unit deviation first (arXiv:2403.01427, there with T 2 and a weight
    of 9).

    Args:
        weight: Factor in the total; 1 in the paper, 9 to 18 with standardize.
        alpha: Factor of the part about the label's class (TCKD).
        beta: Factor of the part about the other classes (NCKD).
        temperature: T of both softmaxes.
        warmup_epochs: Epochs over which the term grows linearly to its weight; 0 is none.
        standardize: Take both logits to zero mean and unit deviation per sample first.

    Source: Zhao et al. 2022, arXiv:2203.08679, section 3; megvii-research/mdistiller
    mdistiller/distillers/DKD.py.
    Needs: the logits of both networks on x, and the labels.
    Weight: 1, the reference's.
    Tests: tests/losses/test_logit_losses.py, test_peer_losses.py, test_dense_logits.py,
    test_terms_on_ranks.py; oracles logit_losses.json, peer_losses.json (the authors' code).
    """

    label_kind = "class"
    takes_pixels = True

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        alpha: NonNegativeFloat = 1.0,
        beta: NonNegativeFloat = 8.0,
        temperature: PositiveFloat = 4.0,
        warmup_epochs: NonNegativeFloat = 20.0,
        standardize: bool = False,
        name: str = "dkd",
    ) -> None:
        super().__init__(name, self.needs_of(), {name: weight})
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.warmup_epochs = warmup_epochs
        self.standardize = standardize

    @override
    @classmethod
    def needs_of(cls, **keys: Any) -> tuple[Need, ...]:
        return both_logits("x")

    @override
    def bind(self, context: BindContext) -> None:
        """Refuse two classes: the softmax over a single other class knows nothing."""
        if context.num_classes < 3:
            raise UserError(
                f"losses.{self.name} is undefined for {context.num_classes} classes, it compares "
                "the classes besides the label's: use losses.kd"
            )

    @override
    def schedules(self) -> dict[str, Callable[[float], float]]:
        return {"warmup": linear_warmup(self.warmup_epochs)}

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """Mean over the rows."""
        student_NC, teacher_NC = self.wanted(inputs)
        dense = student_NC.dim() > 2
        student_NC, teacher_NC = as_rows(student_NC), as_rows(teacher_NC)
        if self.standardize:
            student_NC, teacher_NC = standardize(student_NC), standardize(teacher_NC)
        labels_N = inputs.labels_N.flatten()
        counts_N = labels_N != NO_LABEL
        known_N = labels_N.clamp(min=0) if dense else labels_N
        tckd_N, nckd_N = decoupled_rows(student_NC, teacher_NC, known_N, self.temperature)
        loss_N = self.alpha * tckd_N + self.beta * nckd_N
        if dense:
            loss = torch.where(counts_N, loss_N, 0.0).sum() / counts_N.sum().clamp_min(1)
        else:
            loss = loss_N.mean()
        return TermOutput({self.name: inputs.schedule["warmup"] * loss})


def decoupled_rows(
    student_NC: Tensor, teacher_NC: Tensor, labels_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(TCKD, NCKD) per row, each with T^2, [N]; raw logits, no gradient to the teacher.

    p_y / (1 - p_y) = exp(m) for m = z_y - log sum exp of the others (at T): from m, both halves of
    TCKD are accurate where p_y or 1 - p_y underflows, which gives infinity in the reference.
    """
    others_M = torch.arange(student_NC.shape[1] - 1, device=labels_N.device)
    others_NM = others_M + (others_M >= labels_N[:, None])
    student_NM, teacher_NM = student_NC.gather(1, others_NM), teacher_NC.gather(1, others_NM)
    nckd_N = kd_loss(student_NM, teacher_NM, temperature=temperature).kd

    def margin_N(logits_NC: Tensor, others_NM: Tensor) -> Tensor:
        own_N = logits_NC.gather(1, labels_N[:, None]).squeeze(1)
        scaled_NM = widened(others_NM) / temperature
        return widened(own_N) / temperature - scaled_NM.logsumexp(1)

    s_N = margin_N(student_NC, student_NM)
    t_N = margin_N(teacher_NC, teacher_NM).detach()
    tckd_N = t_N.sigmoid() * (F.logsigmoid(t_N) - F.logsigmoid(s_N))
    tckd_N = tckd_N + (-t_N).sigmoid() * (F.logsigmoid(-t_N) - F.logsigmoid(-s_N))
    return temperature**2 * tckd_N, nckd_N
