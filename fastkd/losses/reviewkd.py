"""ReviewKD: deeper student maps help to imitate shallower teacher maps, as a term of a recipe.

Chen et al. 2021, arXiv:2104.09044.
"""

from collections.abc import Callable, Sequence

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.errors import UserError
from fastkd.losses.base.registry import TermConfig
from fastkd.losses.base.schedules import linear_warmup
from fastkd.losses.base.term import (
    BindContext,
    LossTerm,
    TermInputs,
    TermOutput,
    autocast_like,
    check_numbers,
    widened,
)

__all__ = ["Fusion", "ReviewKD", "ReviewKDConfig", "context_loss"]

STUDENT = ("stage1", "stage2", "stage3", "pooled")
TEACHER = ("stage1:preact", "stage2:preact", "stage3:preact", "pooled")


class ReviewKD(LossTerm):
    """Deeper maps of the student, fused, imitate shallower maps of the teacher.

        loss = warmup * sum over levels of HCL(fused student map, teacher map)
        HCL = weighted mean of mean squared errors of the maps and of their pooled grids

    HCL is `context_loss`. From deep to shallow, a level's student map is fused with what the deeper
    levels left (`Fusion`) and brought to the teacher's width and size. `student` and `teacher` name
    the taps of the levels, the shallowest first; those of the teacher are pre-activation, `pooled`
    vectors are maps of 1x1. The defaults suit networks of three stages. Add the cross entropy
    beside it.

    Weights of the reference: 5 for wide ResNets, resnet8x4 and ShuffleNetV1, 8 for ShuffleNetV2,
    0.6 for resnet20, 1 for resnet32; on ImageNet 1 for ResNet-34 to ResNet-18 and 8 for ResNet-50
    to MobileNetV1. A batch of one image is refused by the batch norms of the fusion.

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
        student: Sequence[str] = STUDENT,
        teacher: Sequence[str] = TEACHER,
        weight: float = 5.0,
        max_width: int = 512,
        warmup_epochs: float = 20.0,
        name: str = "reviewkd",
    ) -> None:
        if len(student) != len(teacher) or not student:
            raise ValueError(
                f"ReviewKD compares level by level, got {len(student)} taps of the student and "
                f"{len(teacher)} of the teacher: name as many of each, at least one"
            )
        student_needs = [f"x/student/{tap}" for tap in student]
        teacher_needs = [f"x/teacher/{tap}" for tap in teacher]
        super().__init__(name, (*student_needs, *teacher_needs), {name: weight})
        check_numbers(name, above=0, max_width=max_width)
        check_numbers(name, least=0, warmup_epochs=warmup_epochs)
        self.levels = list(zip(student_needs, teacher_needs, strict=True))[::-1]
        self.max_width = max_width
        self.warmup_epochs = warmup_epochs

    def bind(self, context: BindContext) -> None:
        """One `Fusion` per level, all of the width of the deepest student map, at most 512."""
        for need in self.needs:
            if len(context.shapes[need]) not in (1, 3):
                raise UserError(
                    f"losses.{self.name} compares maps [C, H, W] and vectors [C], but {need} is "
                    f"{list(context.shapes[need])} per image: name stages"
                )
        channels = [(context.shapes[s][0], context.shapes[t][0]) for s, t in self.levels]
        width = min(self.max_width, channels[0][0])
        self.fusions = nn.ModuleList(
            Fusion(student, width, teacher, first=level == 0)
            for level, (student, teacher) in enumerate(channels)
        )

    def schedules(self) -> dict[str, Callable[[float], float]]:
        """`warmup`."""
        return {"warmup": linear_warmup(self.warmup_epochs)}

    def forward(self, inputs: TermInputs) -> TermOutput:
        """From the deepest level to the shallowest."""
        deeper_NCHW = None
        losses = []
        for fusion, needs in zip(self.fusions, self.levels, strict=True):
            student_NCHW, teacher_NCHW = (_as_map(inputs.tensors[need]) for need in needs)
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


def _conv_norm(inputs: int, outputs: int, side: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _resized(map_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    same = (map_NCHW.shape[2], map_NCHW.shape[3]) == size
    return map_NCHW if same else F.interpolate(map_NCHW, size, mode="nearest")


def _as_map(features: Tensor) -> Tensor:
    return features[:, :, None, None] if features.dim() == 2 else features


class ReviewKDConfig(TermConfig):
    """Keys of `losses.reviewkd`."""

    weight: PositiveFloat
    """Factor in the total, set per pair of networks: 0.6 to 8."""
    student: tuple[str, ...] = Field(default=STUDENT, min_length=1)
    """Taps of the student, the shallowest first."""
    teacher: tuple[str, ...] = Field(default=TEACHER, min_length=1)
    """Taps of the teacher, one for each of the student."""
    max_width: PositiveInt = 512
    """Largest width of the fused maps."""
    warmup_epochs: NonNegativeFloat = 20.0
    """Epochs over which the term grows linearly to its weight; 0 is none."""

    @model_validator(mode="after")
    def _as_many(self) -> "ReviewKDConfig":
        if len(self.student) != len(self.teacher):
            raise ValueError(
                f"losses.reviewkd: {len(self.student)} taps in student, {len(self.teacher)} in "
                "teacher: name as many of each"
            )
        return self

    def build(self, name: str) -> LossTerm:
        """The term."""
        return ReviewKD(name=name, **self.model_dump())
