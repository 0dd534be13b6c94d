"""`report.record=samples`: images as the networks see them in the last step, and what they say.

"Understanding the Success of Knowledge Distillation: A Data Augmentation Perspective", figure 5:
CutMix samples with the target that CutMix gives them and the teacher's five most probable classes;
its text counts how often teacher and CutMix disagree on the class (52.1 percent on ImageNet).
"""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from fastkd.augment.views import ViewMaker
from fastkd.config.section import Normalization
from fastkd.evaluation.evaluate import answer, evaluating
from fastkd.training.config import RecordName
from fastkd.training.progress import Plan
from fastkd.training.recording.recording import Arrays, Recording
from fastkd.training.step import Prepared

__all__ = ["SAMPLES", "Samples"]

SAMPLES = 8
"""Images that are kept: those on which the teacher believes least in the labels."""
_TOP = 5


class Samples(Recording):
    """Keeps images of the last batch of the run: of x', of the whole pool of a pick, else of x."""

    name: ClassVar[RecordName] = "samples"
    in_arrays = True

    def __init__(
        self,
        student: nn.Module,
        *,
        view: str,
        views: ViewMaker,
        normalization: Normalization,
        plan: Plan,
        steps: int,
    ) -> None:
        """view: of which the targets have the teacher's logits. steps: of an epoch."""
        self.student, self.view, self.plan = student, view, plan
        self.views = replace(views, mixes=("labels",))
        self.normalization = normalization
        self.last_step = steps - 1

    @override
    def of_epoch(self, epoch: int, last: Prepared, wait_ms: float) -> Arrays | None:
        if epoch != self.plan.epochs:
            return None
        images_PCHW = last.views[self.view]
        targets_PC = self._targets(last, epoch)
        teacher_PC = last.targets[f"{self.view}/teacher/logits"].float().softmax(1)
        with evaluating(self.student) as student, torch.no_grad():
            student_PC = answer(student, images_PCHW, self.views.placement.precision).softmax(1)
        # Where a class has a part of the label, what the teacher gives to it.
        believed_P = (teacher_PC * (targets_PC > 0)).sum(1)
        index_S = believed_P.argsort(stable=True)[:SAMPLES]
        differ_P = teacher_PC.argmax(1) != targets_PC.argmax(1)
        kept = {
            "images_SHWC": self._pixels(images_PCHW[index_S]),
            "disagreement": np.array(differ_P.double().mean().item()),
            "counted": np.array(len(differ_P)),
        }
        for name, rows_PC in (
            ("target", targets_PC),
            ("teacher", teacher_PC),
            ("student", student_PC),
        ):
            top = rows_PC[index_S].topk(min(_TOP, rows_PC.shape[1]), dim=1)
            kept[f"{name}_classes_SK"] = top.indices.cpu().numpy()
            kept[f"{name}_shares_SK"] = top.values.float().cpu().numpy()
        return kept

    def _targets(self, last: Prepared, epoch: int) -> Tensor:
        """The label of every image as rows of probabilities, mixed like its pixels."""
        if self.view == "xprime":
            shown = self.plan.shown_epoch(epoch - 1)
            made = self.views.xprime_targets(last.batch, {}, shown, self.last_step)
            return made["xprime/mixed/labels"]
        labels_N = last.batch.labels_N
        if labels_N.is_floating_point():
            return labels_N.float()
        classes = self.views.num_classes
        return torch.nn.functional.one_hot(labels_N.clamp_min(0), classes).float()

    def _pixels(self, images_SCHW: Tensor) -> np.ndarray:
        """uint8 RGB [S, H, W, 3]."""
        mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in self.normalization)
        shares_SCHW = images_SCHW.float().cpu() * std + mean
        pixels_SCHW = (255 * shares_SCHW).round().clamp(0, 255).to(torch.uint8)
        return pixels_SCHW.permute(0, 2, 3, 1).contiguous().numpy()
