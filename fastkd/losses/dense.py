"""Losses for dense prediction: CWD, where each channel is active, and MGD, maps made from half of
their pixels.
"""

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Lt
from pydantic import PositiveFloat
from torch import Tensor, nn
from typing_extensions import override

from fastkd.errors import UserError
from fastkd.kernels import kd_loss_mean
from fastkd.losses.base.arguments import Weight
from fastkd.losses.base.dtypes import autocast_like, widened
from fastkd.losses.base.pairs import Pairs, PairTerm, pool_alike
from fastkd.losses.base.term import BindContext

__all__ = ["CWD", "MGD"]

LOGITS = {"logits": "logits"}


class CWD(PairTerm):
    """Channel-wise distillation: each channel is active where the teacher's is.

        p_c = softmax over the pixels of (channel c / T)
        loss = T^2 mean over images and channels of KL(p_teacher_c || p_student_c)

    The paper has a factor of 3 for logits and of 50 for feature maps, and T 4. `pairs` maps a tap
    of the student to a tap of the teacher; logits are compared at the size of the labels, where
    the released code takes them as the network gives them, 8 times smaller (the KL of two
    distributions over an area depends little on its resolution). Where the sizes of other maps
    differ the larger is average-pooled to the smaller; the authors' are equal. Every pixel
    counts, also one without a class: no label is read.

    Where the channels differ in number, `connector` brings the student's to the teacher's: "conv"
    (a 1x1 convolution) is the paper's, "released" (a 1x1 convolution, batch norm and ReLU) is what
    its code trains on feature maps. Neither has a bias, which softmax and norm would cancel.

    Args:
        pairs: Tap of the student: tap of the teacher.
        temperature: T of both softmaxes.
        connector: Of maps with other channels: conv (1x1) as in the paper, or released (1x1, batch
            norm, ReLU) as in its code.

    Source: Shu et al. 2021, arXiv:2011.13256, section 3.2; class CriterionCWD of
    irfanICMLL/TorchDistiller SemSeg-distill/utils/criterion.py, its connector in
    irfanICMLL/TorchDistiller SemSeg-distill/networks/kd_model.py; open-mmlab/mmrazor
    mmrazor/models/losses/cwd.py, which agrees.
    Needs: pairs of taps on x, maps; by default the logits of a network for segmentation.
    Weight: 3, the paper's for logits; 50 for feature maps.
    Tests: tests/losses/test_dense.py, test_terms_on_ranks.py; no released number, the released
    formula in float64 is the oracle.
    """

    def __init__(
        self,
        pairs: Pairs = LOGITS,
        *,
        weight: Weight = 3.0,
        temperature: PositiveFloat = 4.0,
        connector: Literal["conv", "released"] = "conv",
        name: str = "cwd",
    ) -> None:
        super().__init__(name, pairs, weight)
        self.temperature = temperature
        self.connector = connector

    @override
    def bind(self, context: BindContext) -> None:
        """Make the connectors; UserError for maps of one pixel, whose softmax is always 1."""
        self.connectors = nn.ModuleList()
        for number, (student, teacher) in enumerate(self.map_shapes(context)):
            if min(student[1], teacher[1]) * min(student[2], teacher[2]) < 2:
                raise UserError(
                    f"losses.{self.name} compares the pixels of a channel, but the maps of "
                    f"{self.needs[2 * number]} and {self.needs[2 * number + 1]} have only one in "
                    f"common: pair larger maps"
                )
            self.connectors.append(self._connecting(student[0], teacher[0]))

    def _connecting(self, student: int, teacher: int) -> nn.Module:
        if student == teacher:
            return nn.Identity()
        convolution = nn.Conv2d(student, teacher, 1, bias=False)
        if self.connector == "conv":
            return convolution
        return nn.Sequential(convolution, nn.BatchNorm2d(teacher), nn.ReLU())

    @override
    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        """A row of the kernel is a channel of an image, [N C, H W]."""
        student, teacher = pool_alike(student, teacher)
        with autocast_like(student):
            student = self.connectors[number](student)
        student_RP, teacher_RP = (x.flatten(2).flatten(0, 1) for x in (student, teacher))
        return kd_loss_mean(
            student_RP, teacher_RP, kd_weight=1.0, ce_weight=0.0, temperature=self.temperature
        )


class MGD(PairTerm):
    """Masked generative distillation: some pixels of the student's map make the teacher's whole.

        kept = 0 with probability `mask_ratio` and else 1, for each pixel of each image
        loss = sum of (generation(align(student) * kept) - teacher)^2 / number of images

    align is a 1x1 convolution where the channels differ in number; generation is a 3x3
    convolution, a ReLU and a 3x3 convolution, all of the teacher's width and trained. A masked
    pixel is 0 in all channels and every pixel of the teacher's map counts. Masks are drawn anew in
    every step, from the run's seed and the step, so that a resumed run draws the same; ranks draw
    their own. Where the sizes differ the larger map is average-pooled; the authors' are equal.

    The loss is a sum over the map, so its size grows with the map's. The reference has a weight of
    0.00002 and masks 0.75 for segmentation (the last stage of PSPNet and DeepLabV3 at 1/8 of
    512x512), and 0.00002 and 0.65 for detection; beside it, for segmentation, it has `losses.cwd`
    on the logits with weight 3 and T 4.

    Args:
        mask_ratio: Share of the pixels that are masked; lambda in the paper.

    Source: Yang et al. 2022, arXiv:2205.01529, section 3; yzd-v/MGD
    seg/mmseg/distillation/losses/mgd.py.
    Needs: pairs of taps on x, maps; in the reference the last stage of each network.
    Weight: 0.00002, the reference's for segmentation and detection.
    Tests: tests/losses/test_dense.py, test_terms_on_ranks.py; no released number, the released
    formula in float64 is the oracle.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        weight: Weight = 2e-5,
        mask_ratio: Annotated[float, Ge(0), Lt(1)] = 0.75,
        name: str = "mgd",
    ) -> None:
        super().__init__(name, pairs, weight)
        self.mask_ratio = mask_ratio

    @override
    def bind(self, context: BindContext) -> None:
        """Make the aligning and the generating layers."""
        self.aligns, self.generations = nn.ModuleList(), nn.ModuleList()
        for (student, *_), (teacher, *_) in self.map_shapes(context):
            same = student == teacher
            self.aligns.append(nn.Identity() if same else nn.Conv2d(student, teacher, 1))
            first, second = (nn.Conv2d(teacher, teacher, 3, padding=1) for _ in range(2))
            self.generations.append(nn.Sequential(first, nn.ReLU(), second))

    @override
    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = pool_alike(student, teacher)
        size_N1HW = (len(student), 1, *student.shape[2:])
        # From torch's generator, which every step seeds.
        kept_N1HW = torch.rand(size_N1HW, device=student.device) >= self.mask_ratio
        with autocast_like(student):
            aligned_NCHW = self.aligns[number](student)
            made_NCHW = self.generations[number](aligned_NCHW * kept_N1HW.to(aligned_NCHW.dtype))
        error_NCHW = widened(made_NCHW) - widened(teacher)
        return error_NCHW.square().sum() / len(student)
