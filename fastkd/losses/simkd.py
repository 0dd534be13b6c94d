"""SimKD: the student learns the teacher's last map and takes over its classifier.

Chen et al. 2022, arXiv:2203.14001.
"""

from typing import Any

import torch
from pydantic import PositiveInt
from torch import nn
from torch.nn import functional as F
from typing_extensions import override

from fastkd.errors import UserError
from fastkd.losses.base.arguments import Weight
from fastkd.losses.base.dtypes import autocast_like, widened
from fastkd.losses.base.needs import Need
from fastkd.losses.base.term import BindContext, LossTerm, TermInputs, TermOutput
from fastkd.models.reused_head import Projector, ReusedHead, pooled_to

__all__ = ["SimKD"]


class SimKD(LossTerm):
    """The student's projected map imitates the teacher's; no other loss.

        loss = mean of (projector(student) - teacher)^2

    `Projector` brings the student's map to the teacher's width; where the maps differ in size, the
    larger one is average-pooled. What is evaluated, kept and returned is a
    `fastkd.models.reused_head.ReusedHead`: student, projector and the teacher's classifier. With
    the paper's `weight` 1 the recipe has no cross entropy and no KD.

    Both taps are the last map before pooling. A teacher tap `stageN:preact` is rectified first,
    which is what a wide ResNet pools (its `stage3` is a raw sum).

    Args:
        weight: Factor in the total; 1 in the paper.
        student: Tap of the student: its last map.
        teacher: Tap of the teacher: the map that it pools.
        factor: The projector's inner width is the teacher's divided by this.

    Source: Chen et al. 2022, arXiv:2203.14001, section 3; class SimKD of DefangChen/SimKD
    models/util.py, and DefangChen/SimKD helper/loops.py.
    Needs: the last map of both networks on x, and the teacher's classifier.
    Weight: 1, the paper's.
    Tests: tests/losses/test_simkd_run.py, test_map_losses.py, test_peer_losses.py,
    test_terms_on_ranks.py; oracle peer_losses.json (the authors' code).
    """

    uses_head = True

    def __init__(
        self,
        *,
        student: str = "stage3",
        teacher: str = "stage3",
        factor: PositiveInt = 2,
        weight: Weight = 1.0,
        name: str = "simkd",
    ) -> None:
        super().__init__(name, self.needs_of(student=student, teacher=teacher), {name: weight})
        self.student, self.teacher, self.factor = student, teacher, factor

    @override
    @classmethod
    def needs_of(cls, *, student: str, teacher: str, **keys: Any) -> tuple[Need, ...]:
        return Need.of("x", "student", student), Need.of("x", "teacher", teacher)

    @override
    def bind(self, context: BindContext) -> None:
        """The projector; UserError if the teacher's classifier does not fit its map."""
        student, teacher = (context.shapes[need] for need in self.needs)
        for need, shape in ((self.needs[0], student), (self.needs[1], teacher)):
            if len(shape) != 3:
                raise UserError(
                    f"losses.{self.name} compares maps [C, H, W], but {need} is {list(shape)} per "
                    f"image: name the last stage as losses.{self.name}.student and .teacher"
                )
        head = context.teacher_head
        if head is None or head.in_features != teacher[0]:
            takes = "no linear classifier" if head is None else f"one of {head.in_features} values"
            raise UserError(
                f"losses.{self.name} reuses the teacher's classifier on {teacher[0]} pooled "
                f"channels of its {self.teacher}, but the teacher has {takes}: name the map that "
                f"it pools as losses.{self.name}.teacher, or take another teacher"
            )
        if self.factor > teacher[0]:
            raise UserError(
                f"losses.{self.name}.factor={self.factor} leaves no channels of the teacher's "
                f"{teacher[0]}: use a smaller one"
            )
        self._check_pooled(context)
        self.projector = Projector(student[0], teacher[0], self.factor)
        self.size = teacher[1:]
        # In a tuple: the teacher's layer is neither trained nor saved with the term.
        self._head = (head,)

    def _check_pooled(self, context: BindContext) -> None:
        """UserError if there is more than pooling between the tap and the classifier."""
        pooled = None if context.teacher_pooled is None else context.teacher_pooled()
        if pooled is None or self.teacher in pooled:
            return
        cure = "no tap feeds it through pooling alone: use another teacher"
        if pooled:
            cure = f"set losses.{self.name}.teacher={pooled[0]}, which it pools"
        raise UserError(
            f"losses.{self.name} reuses the teacher's classifier right behind the pooled "
            f"{self.teacher}, but this teacher does more in between, such as a batch norm or a "
            f"ReLU: {cure}"
        )

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """The training accuracy is measured on the projected map."""
        student_NCHW, teacher_NCHW = self.wanted(inputs)
        if self.teacher.endswith(":preact"):
            teacher_NCHW = teacher_NCHW.relu()
        with autocast_like(student_NCHW):
            projected_NCHW = self.projector(pooled_to(student_NCHW, self.size))
            with torch.no_grad():
                logits_NC = self._head[0](projected_NCHW.mean((2, 3)))
        target_NCHW = pooled_to(teacher_NCHW, projected_NCHW.shape[2:])
        loss = F.mse_loss(widened(projected_NCHW), widened(target_NCHW))
        return TermOutput({self.name: loss}, logits_NC=logits_NC)

    @override
    def export(self, student: nn.Module) -> ReusedHead:
        """Student, projector and the teacher's classifier as one network, on their own weights."""
        head = self._head[0]
        return ReusedHead(student, self.projector, head, tap=self.student, size=self.size)
