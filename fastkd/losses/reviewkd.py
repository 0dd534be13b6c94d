"""ReviewKD: deeper student maps help to imitate shallower teacher maps, as a term of a recipe.

Chen et al. 2021, arXiv:2104.09044.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import torch
from annotated_types import MinLen
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from fastkd.errors import UserError
from fastkd.losses.base.arguments import Weight
from fastkd.losses.base.dtypes import autocast_like, widened
from fastkd.losses.base.needs import Need
from fastkd.losses.base.schedules import linear_warmup
from fastkd.losses.base.term import BindContext, LossTerm, TermInputs, TermOutput

__all__ = ["Fusion", "ReviewKD", "context_loss"]

T = TypeVar("T")
STUDENT = ("stage1", "stage2", "stage3", "pooled")
TEACHER = ("stage1:preact", "stage2:preact", "stage3:preact", "pooled")


class ReviewKD(LossTerm):
    """Deeper maps of the student, fused, imitate shallower maps of the teacher.

        loss = warmup * sum over levels of HCL(fused student map, teacher map)
        HCL = weighted mean of mean squared errors of the maps and of their pooled grids

    HCL is `context_loss`. From deep to shallow, a level's student map is fused with what the deeper
    levels left (`Fusion`) and brought to the teacher's width and size. `student` and `teacher` name
    the taps of the levels, the shallowest first; the teacher's are pre-activation, `pooled`
    vectors are maps of 1x1. The defaults suit networks of three stages. Add a cross entropy loss
    to it.

    Weights of the reference: 5 for wide ResNets, resnet8x4 and ShuffleNetV1, 8 for ShuffleNetV2,
    0.6 for resnet20, 1 for resnet32; on ImageNet 1 for ResNet-34 to ResNet-18 and 8 for ResNet-50
    to MobileNetV1. A batch of one image is refused by the batch norms of the fusion.

    Args:
        weight: Factor in the total, set per pair of networks: 0.6 to 8.
        student: Taps of the student, the shallowest first.
        teacher: Taps of the teacher, one for each of the student.
        max_width: Largest width of the fused maps.
        warmup_epochs: Epochs over which the term grows linearly to its weight; 0 is none.

    Source: Chen et al. 2021, arXiv:2104.09044, section 3; dvlab-research/ReviewKD
    CIFAR-100/model/reviewkd.py and megvii-research/mdistiller mdistiller/distillers/ReviewKD.py,
    which agree.
    Needs: taps of both networks on x, one per level, the teacher's before the activation.
    Weight: 5, one of the reference's.
    Tests: tests/losses/test_map_losses.py, test_peer_losses.py, test_terms_on_ranks.py; oracles
    logit_losses.json, peer_losses.json (the authors' code).
    """

    def __init__(
        self,
        *,
        student: Annotated[Sequence[str], MinLen(1)] = STUDENT,
        teacher: Annotated[Sequence[str], MinLen(1)] = TEACHER,
        weight: Weight = 5.0,
        max_width: PositiveInt = 512,
        warmup_epochs: NonNegativeFloat = 20.0,
        name: str = "reviewkd",
    ) -> None:
        super().__init__(name, self.needs_of(student=student, teacher=teacher), {name: weight})
        self.max_width = max_width
        self.warmup_epochs = warmup_epochs

    @override
    @classmethod
    def needs_of(
        cls, *, student: Sequence[str], teacher: Sequence[str], **keys: Any
    ) -> tuple[Need, ...]:
        if len(student) != len(teacher):
            raise UserError(
                f"reviewkd compares level by level, got {len(student)} taps of the student and "
                f"{len(teacher)} of the teacher: name as many of each"
            )
        return (
            *(Need.of("x", "student", tap) for tap in student),
            *(Need.of("x", "teacher", tap) for tap in teacher),
        )

    @override
    def bind(self, context: BindContext) -> None:
        """One `Fusion` per level, all of the width of the deepest student map, at most 512."""
        for need in self.needs:
            if len(context.shapes[need]) not in (1, 3):
                raise UserError(
                    f"losses.{self.name} compares maps [C, H, W] and vectors [C], but {need} is "
                    f"{list(context.shapes[need])} per image: name stages"
                )
        channels = [(s[0], t[0]) for s, t in _levels([context.shapes[need] for need in self.needs])]
        width = min(self.max_width, channels[0][0])
        self.fusions = nn.ModuleList(
            Fusion(student, width, teacher, first=level == 0)
            for level, (student, teacher) in enumerate(channels)
        )

    @override
    def schedules(self) -> dict[str, Callable[[float], float]]:
        return {"warmup": linear_warmup(self.warmup_epochs)}

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """From the deepest level to the shallowest."""
        deeper_NCHW = None
        losses = []
        levels = _levels([_as_map(tensor) for tensor in self.wanted(inputs)])
        for fusion, (student_NCHW, teacher_NCHW) in zip(self.fusions, levels, strict=True):
            size = (teacher_NCHW.shape[2], teacher_NCHW.shape[3])
            with autocast_like(student_NCHW):
                fused_NCHW, deeper_NCHW = fusion(student_NCHW, deeper_NCHW, size)
            losses.append(context_loss(fused_NCHW, teacher_NCHW))
        return TermOutput({self.name: inputs.schedule["warmup"] * torch.stack(losses).sum()})


class Fusion(nn.Module):
    """Attention-based fusion (ABF) of one level with the deeper ones.

    1x1 conv and BN to a common width; below the deepest level the deeper map, resized (nearest), is
    mixed in with two weights per pixel, the sigmoid of a 1x1 conv on both; then 3x3 conv and BN to
    the teacher's width.
    """

    def __init__(self, student: int, width: int, teacher: int, *, first: bool) -> None:
        super().__init__()
        self.enter = _conv_norm(student, width, 1)
        self.attention = None if first else nn.Conv2d(2 * width, 2, 1)
        self.leave = _conv_norm(width, teacher, 3)

    def forward(
        self, student_NCHW: Tensor, deeper_NCHW: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """(map of the teacher's width and `size`, common map for the next shallower level)."""
        x_NCHW = self.enter(student_NCHW)
        if self.attention is not None:
            assert deeper_NCHW is not None
            y_NCHW = _resized(deeper_NCHW, (x_NCHW.shape[2], x_NCHW.shape[3]))
            share_N2HW = self.attention(torch.cat([x_NCHW, y_NCHW], 1)).sigmoid()
            x_NCHW = x_NCHW * share_N2HW[:, :1] + y_NCHW * share_N2HW[:, 1:]
        x_NCHW = _resized(x_NCHW, size)
        return self.leave(x_NCHW), x_NCHW


def context_loss(student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
    """Hierarchical context loss (HCL) of two maps of one shape, a scalar.

    Weighted mean of mean squared errors: of the maps (weight 1) and of their average-pooled grids
    of 4, 2 and 1 that are smaller than the map, each used grid with half the weight of the one
    before. Pooling is linear, so it is done once, on the difference.
    """
    difference_NCHW = widened(student_NCHW) - widened(teacher_NCHW)
    loss, weight, total = difference_NCHW.square().mean(), 1.0, 1.0
    for side in (4, 2, 1):
        if side < difference_NCHW.shape[2]:
            weight /= 2
            total += weight
            pooled_NCHW = F.adaptive_avg_pool2d(difference_NCHW, side)
            loss = loss + weight * pooled_NCHW.square().mean()
    return loss / total


def _levels(of_needs: Sequence[T]) -> list[tuple[T, T]]:
    """Student and teacher of each level, from the deepest to the shallowest."""
    count = len(of_needs) // 2
    return list(zip(of_needs[:count], of_needs[count:], strict=True))[::-1]


def _conv_norm(inputs: int, outputs: int, side: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _resized(map_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    same = (map_NCHW.shape[2], map_NCHW.shape[3]) == size
    return map_NCHW if same else F.interpolate(map_NCHW, size, mode="nearest")


def _as_map(features: Tensor) -> Tensor:
    return features[:, :, None, None] if features.dim() == 2 else features
