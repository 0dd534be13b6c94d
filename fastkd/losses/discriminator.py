"""The discriminator of MEAL V2 as a term of a recipe; its similarity loss is `SoftCE` at T = 1.

Shen and Savvides 2020, arXiv:2009.08453, section 5.
"""

from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import nn
from torch.nn import functional as F
from typing_extensions import override

from fastkd.losses.base.arguments import Weight
from fastkd.losses.base.dtypes import as_rows, widened
from fastkd.losses.base.needs import MEAN_LOGITS, Need, View
from fastkd.losses.base.term import BindContext, LossTerm, TermInputs, TermOutput

__all__ = ["Discriminator"]

LR_SCALE = {"released": 1.0, "paper": 0.01}


class Discriminator(LossTerm):
    """A small network learns to distinguish the student's logits from the teacher's.

        D = Linear C -> hidden[0] -> hidden[1] -> 2, ReLU between, on the 2 N rows of both logits
        loss = mean over 4 N entries of BCE(sigmoid(D(row)), (1, 0) of student, (0, 1) of teacher)

    With several teachers it sees the mean of their logits, as released ("the last output layer
    before softmax" in the paper), not the logits of the mean probability, which the similarity loss
    uses.

    `mode` sets what the student does with the gradient:

        cooperative  follows it, so that it stays distinguishable: the released code, whose author
                     calls the term a regulariser; the two are not adversaries
        reversed     follows its negative, so that it becomes indistinguishable (a flag of the
                     first MEAL)
        detached     gets none: the discriminator only watches

    The hidden widths are C // 8 and C // 64 as released (1000 -> 125 -> 15 -> 2), but at least 16
    and 8, because 10 classes would leave none. `last_relu` also clips the two outputs as the
    released code does; one of them is then often dead from the start. `lr_rule`: "released" trains
    it at the student's rate, which the released code does by accident; "paper" at a hundredth of
    it, as its flag of 1e-4 and the student's 0.01 imply. No weight decay.

    Args:
        weight: Factor in the total; 1 in the released code.
        mode: What the student does with the gradient: follows it, its negative, or nothing.
        hidden: Widths of the hidden layers; by default C // 8 and C // 64, at least 16 and 8.
        last_relu: Clip the outputs at 0 before the sigmoid, as the released code does.
        lr_rule: Its learning rate: the student's, or a hundredth of it.
        view: View whose logits it sees.

    Source: Shen and Savvides 2020, arXiv:2009.08453, section 5, Eq. 4 and 5; szq0214/MEAL-V2
    models/discriminator.py and szq0214/MEAL-V2 loss.py.
    Needs: the student's logits and the teachers' mean logits on `view`.
    Weight: 1, the reference's.
    Tests: tests/losses/test_logit_losses.py, test_peer_losses.py, test_terms_on_ranks.py; oracle
    peer_losses.json (the authors' code).
    """

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        mode: Literal["cooperative", "reversed", "detached"] = "cooperative",
        hidden: tuple[PositiveInt, PositiveInt] | None = None,
        last_relu: bool = False,
        lr_rule: Literal["released", "paper"] = "released",
        view: View = "x",
        name: str = "discriminator",
    ) -> None:
        super().__init__(name, self.needs_of(view=view), {name: weight})
        self.mode, self.hidden, self.last_relu, self.lr_rule = mode, hidden, last_relu, lr_rule

    @override
    @classmethod
    def needs_of(cls, *, view: View, **keys: Any) -> tuple[Need, ...]:
        return Need.of(view, "student", "logits"), Need.of(view, "teacher", MEAN_LOGITS)

    @override
    def bind(self, context: BindContext) -> None:
        """The three layers."""
        classes = context.num_classes
        hidden = self.hidden or (max(classes // 8, 16), max(classes // 64, 8))
        sizes = pairwise((classes, *hidden, 2))
        layers = [layer for a, b in sizes for layer in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*(layers if self.last_relu else layers[:-1]))

    @override
    def param_groups(self) -> list[dict[str, Any]]:
        """One group, with the rate that `lr_rule` sets."""
        scale = LR_SCALE[self.lr_rule]
        return [{"params": list(self.parameters()), "lr_scale": scale, "weight_decay": 0.0}]

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """Mean over rows and outputs."""
        student_NC, teacher_NC = (as_rows(widened(x)) for x in self.wanted(inputs))
        if self.mode == "reversed":
            student_NC = 2 * student_NC.detach() - student_NC
        elif self.mode == "detached":
            student_NC = student_NC.detach()
        guess_M2 = self.layers(torch.cat([student_NC, teacher_NC]))
        is_student_M = torch.arange(len(guess_M2), device=guess_M2.device) < len(student_NC)
        truth_M2 = torch.stack([is_student_M, ~is_student_M], 1).to(guess_M2.dtype)
        return TermOutput({self.name: F.binary_cross_entropy_with_logits(guess_M2, truth_M2)})
