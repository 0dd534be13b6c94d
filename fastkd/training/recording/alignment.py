"""`report.record=alignment`: how far the stages of the student are from the teacher's.

AlignKD (Kao and Lai), equation 4: the mean over elements of (student - teacher)^2, stage by stage,
without eta; and the same as a share of the mean of teacher^2, which can be compared across stages.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn
from typing_extensions import override

from fastkd.compute.collectives import all_reduce_sum
from fastkd.compute.placement import Placement
from fastkd.errors import UserError
from fastkd.evaluation.evaluate import evaluating
from fastkd.models.intake import image_dtype
from fastkd.models.taps import ZooNetwork
from fastkd.teachers.teacher import Teacher
from fastkd.training.config import RecordName
from fastkd.training.recording.recording import Recording, Row
from fastkd.training.step import Prepared

__all__ = ["Alignment", "stages_in_common"]

_IMAGES = 64
"""Of the last batch; all stages of these are in memory at once."""


def stages_in_common(student: nn.Module, teacher: nn.Module) -> tuple[str, ...]:
    """Stages that both networks of the zoo have, `stage1` first.

    Raises:
        UserError: there is none, or one of them is not from the zoo.
    """
    if not isinstance(student, ZooNetwork) or not isinstance(teacher, ZooNetwork):
        raise UserError(
            "report.record=alignment compares stages by the zoo's names, and student or teacher is "
            "not from the zoo: leave it out"
        )
    known = [tap for tap in student.tap_names if tap.startswith("stage") and ":" not in tap]
    common = tuple(tap for tap in known if tap in teacher.tap_names)
    if not common:
        raise UserError("report.record=alignment: student and teacher have no stage in common")
    return common


class Alignment(Recording):
    """Shows both networks images of the last batch of an epoch, in evaluation mode."""

    name: ClassVar[RecordName] = "alignment"

    def __init__(
        self,
        student: ZooNetwork,
        teacher: Teacher,
        image_shape: tuple[int, int, int],
        placement: Placement,
    ) -> None:
        """teacher: bound with the stages in common as taps of x.

        UserError if no stage has one shape in both.
        """
        self.student, self.teacher, self.placement = student, teacher, placement
        self.stages = tuple(tap for tap in teacher.taps["x"] if tap != "logits")
        probe_NCHW = torch.zeros(2, *image_shape, device=placement.device, dtype=placement.dtype)
        pairs = self._both(probe_NCHW)
        shapes = {tap: [tuple(one.shape[1:]) for one in pair] for tap, pair in pairs.items()}
        self.stages = tuple(tap for tap, (one, other) in shapes.items() if one == other)
        if not self.stages:
            found = "; ".join(f"{tap} {one} and {other}" for tap, (one, other) in shapes.items())
            raise UserError(
                f"report.record=alignment compares stages of one shape, and student and teacher "
                f"have {found}: leave it out"
            )

    def _both(self, images_NCHW: torch.Tensor) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        precision = self.placement.precision
        shown_NCHW = images_NCHW.to(image_dtype(self.student, precision))
        with evaluating(self.student), torch.no_grad(), precision.autocast():
            own = self.student.forward_taps(shown_NCHW, self.stages)
        target = self.teacher.features(images_NCHW)
        return {tap: (own[tap].float(), target[tap].float()) for tap in self.stages}

    @override
    def of_epoch(self, epoch: int, last: Prepared, wait_ms: float) -> Row:
        values = [
            torch.stack([(own - target).square().mean(), target.square().mean()])
            for own, target in self._both(last.views["x"][:_IMAGES]).values()
        ]
        means_S2 = torch.stack(values).double()
        world = self.placement.world
        if world.size > 1:
            all_reduce_sum(means_S2)
            means_S2 /= world.size
        rows = dict(zip(self.stages, means_S2.tolist(), strict=True))
        return {
            "mse": {stage: error for stage, (error, _) in rows.items()},
            "relative": {stage: error / (own or 1e-30) for stage, (error, own) in rows.items()},
        }
