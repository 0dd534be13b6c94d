"""Losses for networks without shortcuts: JointRD and the stage-wise error of AlignKD, as terms.

JointRD: Li et al., "Residual Distillation: Towards Portable Deep Neural Networks without
Shortcuts", NeurIPS 2020. AlignKD: Kao and Lai, whose equations 1 to 3 give their reading of
JointRD.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, MinLen
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from fastkd.errors import UserError
from fastkd.losses.base.arguments import Weight
from fastkd.losses.base.dtypes import autocast_like, widened
from fastkd.losses.base.needs import Need
from fastkd.losses.base.pairs import Pairs, PairTerm
from fastkd.losses.base.schedules import cosine_decay
from fastkd.losses.base.term import BindContext, LossTerm, TermInputs, TermOutput

__all__ = ["JointRD", "StageMSE", "expected_negative", "partial_l2"]

Share = Annotated[float, Ge(0), Le(1)]
Form = Literal["paper", "released"]
Feature = Literal["pooled", "logits", "map"]


class JointRD(LossTerm):
    """The teacher's later stages applied to the student's earlier ones; to be added to the CE.

        paper      eta * (sum over i < n of CE(C(R_i), y) + feature_weight * sum over i <= n of
                   MSE(R_i, teacher)); C is the teacher's classifier, MSE a mean over elements of
                   `feature`: the pooled vector, the logits, or the last map
        released   eta * sum over i < n of CE(C(R_i), y) + feature_weight * (eta * sum over i < n of
                   D_i + D_n); D = `partial_l2` of the last map before its ReLU, through a trained
                   1x1 conv and BN per junction, to the teacher's

    Of stages 1..n, S_i is the student's output of stage i, R_i the teacher's stages i+1..n on it.
    Parts: `<name>` (CE) and `<name>_features`. eta falls along a cosine from 1 to `eta_end` over
    `eta_epochs` epochs. Set losses.ce.weight as well: 1 in the paper, and 0.25 for both in the
    released form, which multiplies all terms by 1/4. Its authors train the teacher at the same
    time; here it is frozen, as the paper says. feature_weight is 1e-3 at 32 px, 1e-4 at 224 px.

    The student's stages must have the teacher's shapes, and the teacher must be from the zoo.
    The junctions join on the batch axis as they come, so that each teacher stage runs once.

    Args:
        weight: Factor in the total; 1 in the paper, 0.25 (and losses.ce.weight=0.25) as released.
        feature_weight: Factor of the features within the term; the released code uses 1e-3 at 32
            px, 1e-4 at 224.
        stages: Taps of student and teacher at which their stages end.
        form: Which formula: AlignKD's equations 1 to 3, or the sum of the released code.
        feature: form=paper: what is compared; the text names all three.
        eta_epochs: Epochs over which eta falls along a cosine from 1.
        eta_end: Where eta ends.

    Source: Li et al., "Residual Distillation", NeurIPS 2020, as equations 1 to 3 of AlignKD (Kao
    and Lai) put it; leoozy/JointRD_Neurips2020@JOINT process/multikd_train.py and
    leoozy/JointRD_Neurips2020@JOINT model/distiller2.py.
    Needs: the outputs of all stages of the student on x, of the teacher what is compared, its
    stages and its classifier.
    Weight: 1, the paper's; feature_weight 1e-3, the released code's at 32 px.
    Tests: tests/losses/test_map_losses.py, test_peer_losses.py, test_terms_on_ranks.py; oracle
    peer_losses.json (the authors' code).
    """

    label_kind = "class"
    uses_stages = True
    margin_C11: Tensor

    def __init__(
        self,
        stages: Annotated[tuple[str, ...], MinLen(2)] = ("stage1", "stage2", "stage3", "stage4"),
        *,
        weight: Weight = 1.0,
        feature_weight: PositiveFloat = 1e-3,
        form: Form = "paper",
        feature: Feature = "pooled",
        eta_epochs: NonNegativeFloat = 60.0,
        eta_end: Share = 0.5,
        name: str = "jointrd",
    ) -> None:
        needs = self.needs_of(stages=stages, form=form, feature=feature)
        weights = self.weights_of(name, weight=weight, feature_weight=feature_weight)
        super().__init__(name, needs, weights)
        _, self.tap = _compared(stages[-1], form, feature)
        self.stages, self.form = tuple(stages), form
        self.compares_maps = form == "released" or feature == "map"
        self.eta_epochs, self.eta_end = eta_epochs, eta_end
        self.eta = cosine_decay(eta_epochs, eta_end)

    @override
    @classmethod
    def needs_of(
        cls, *, stages: Sequence[str], form: Form, feature: Feature, **keys: Any
    ) -> tuple[Need, ...]:
        *early, last = stages
        own, target = _compared(last, form, feature)
        # The batch norm of a teacher without taps is folded, and its stages are gone.
        targets = ("logits", "pooled") if target == "logits" else (target,)
        return (
            *(Need.of("x", "student", tap) for tap in (*early, own)),
            *(Need.of("x", "teacher", tap) for tap in targets),
        )

    @override
    @classmethod
    def weights_of(
        cls, name: str, *, weight: float, feature_weight: float, **keys: Any
    ) -> dict[str, float]:
        return {name: weight, f"{name}_features": weight * feature_weight}

    @override
    def bind(self, context: BindContext) -> None:
        """Check that the student's features fit; the released form makes its connectors."""
        run, head, norm = context.teacher_stages, context.teacher_head, context.teacher_norm
        if run is None or head is None:
            raise UserError(
                f"losses.{self.name} sends the student's features through the teacher's stages, "
                "which only networks of the zoo with a classifier expose: use one as teacher"
            )
        for tap, following in pairwise(self.stages):
            shape = context.shapes[Need.of("x", "student", tap)]
            try:
                with torch.no_grad():
                    run(head.weight.new_zeros(1, *shape), tap, (following,))
            except RuntimeError as error:
                raise UserError(
                    f"losses.{self.name}: the teacher's layers after {tap} do not accept the "
                    f"student's {tap} of {list(shape)} ({error}): both need equal stages"
                ) from error
        own, target = self.needs[len(self.stages) - 1 : len(self.stages) + 1]
        if self.compares_maps and context.shapes[own] != context.shapes[target]:
            raise UserError(
                f"losses.{self.name}: {own} is {list(context.shapes[own])} per image but {target} "
                f"{list(context.shapes[target])}: both need equal stages"
            )
        self.run_teacher = run
        if self.form == "released":
            if norm is None:
                raise UserError(
                    f"losses.{self.name}.form=released takes its margin from the teacher's last "
                    "batch norm, and it has none: use form=paper"
                )
            channels = context.shapes[target][0]
            self.connectors = nn.ModuleList(_connector(channels) for _ in self.stages)
            self.register_buffer("margin_C11", expected_negative(norm), persistent=False)

    @override
    def schedules(self) -> dict[str, Callable[[float], float]]:
        return {"eta": self.eta}

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """Sums over stages, means over rows."""
        tensors = self.wanted(inputs)
        students, target = tensors[: len(self.stages)], tensors[len(self.stages)]
        junctions, last = len(self.stages) - 1, self.stages[-1]
        with autocast_like(students[0]):
            # Junction i joins the rows that the teacher has already taken as far as stage i.
            joined = students[0]
            for (after, upto), own in zip(pairwise(self.stages[:-1]), students[1:-1], strict=True):
                joined = torch.cat([self.run_teacher(joined, after, (upto,))[upto], own])
            found = self.run_teacher(joined, self.stages[-2], (self.tap, "logits"))
            own = students[-1]
            if not self.compares_maps:
                own = self.run_teacher(own, last, (self.tap,))[self.tap]
            features = [*found[self.tap].chunk(junctions), own]
            if self.form == "released":
                pairs = zip(self.connectors, features, strict=True)
                features = [connector(feature) for connector, feature in pairs]
        *early, of_student = [self._distance(feature, target) for feature in features]
        labels = inputs.labels_N.repeat(junctions)
        joint = junctions * F.cross_entropy(widened(found["logits"]), labels)
        eta = inputs.schedule["eta"]
        distance = eta * torch.stack(early).sum()
        # The released code leaves the student's own features out of eta.
        distance = distance + (of_student if self.form == "released" else eta * of_student)
        return TermOutput({self.name: eta * joint, f"{self.name}_features": distance})

    def _distance(self, feature: Tensor, target: Tensor) -> Tensor:
        feature, target = widened(feature), widened(target)
        if self.form == "released":
            return partial_l2(feature, target, self.margin_C11)
        return F.mse_loss(feature, target)


def partial_l2(student_NCHW: Tensor, teacher_NCHW: Tensor, margin_C11: Tensor) -> Tensor:
    """Squared distance to max(teacher, margin), summed, divided by N; a scalar.

    Elements where the teacher is not positive and the student is already below it do not count,
    because a ReLU follows. Heo et al. 2019, arXiv:1904.01866, as JointRD's code uses it.
    """
    target_NCHW = torch.maximum(teacher_NCHW, margin_C11)
    counts_NCHW = (teacher_NCHW > 0) | (student_NCHW > target_NCHW)
    excess_NCHW = torch.where(counts_NCHW, student_NCHW - target_NCHW, 0.0)
    return excess_NCHW.square().sum() / len(student_NCHW)


def expected_negative(norm: nn.BatchNorm2d) -> Tensor:
    """Mean of the negative outputs of a batch norm on normal inputs, per channel, [C, 1, 1].

    Outputs are N(bias, weight^2); -3 * |weight| where at most one in a thousand is negative.
    """
    mean_C, std_C = norm.bias.detach().double(), norm.weight.detach().double().abs()
    z_C = -mean_C / std_C.clamp_min(torch.finfo(torch.float64).tiny)
    share_C = torch.special.ndtr(z_C)
    density_C = (-z_C.square() / 2).exp() / math.sqrt(2 * math.pi)
    inside_C = mean_C - std_C * density_C / share_C
    margin_C = torch.where(share_C > 1e-3, inside_C, -3 * std_C)
    return margin_C.to(norm.weight.dtype)[:, None, None]


def _compared(last: str, form: Form, feature: Feature) -> tuple[str, str]:
    """The student's tap of the last stage, and the teacher's tap that all features imitate."""
    if form == "released":
        return f"{last}:preact", f"{last}:preact"
    return last, last if feature == "map" else feature


def _connector(channels: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, 1, bias=False)
    nn.init.normal_(conv.weight, std=math.sqrt(2 / channels))
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class StageMSE(PairTerm):
    """Squared error of two maps of one shape, without a connector.

        loss = eta * sum over pairs of mean (student - teacher)^2

    `pairs` maps taps of the student to taps of the teacher of the same shape; AlignKD has the
    outputs of all stages, plus losses.kd at temperature 1 with weight and ce_weight 0.5. The
    error is the mean over elements, or with `reduction="sum"` the sum over an image's elements. eta
    falls along a cosine from 1 to `eta_end` over `eta_epochs` epochs; eta_end=1 keeps it at 1.

    Args:
        reduction: Over the elements of an image; both are means over images.
        eta_epochs: Epochs over which eta falls along a cosine from 1.
        eta_end: Where eta ends; 1 keeps the weight constant.

    Source: Kao and Lai, "AlignKD", equations 4 to 7, which has no released code; eta as in
    leoozy/JointRD_Neurips2020@JOINT process/multikd_train.py.
    Needs: pairs of taps on x, of one shape; in the paper the outputs of all stages.
    Weight: 1, the paper's.
    Tests: tests/losses/test_map_losses.py, test_terms_on_ranks.py; no released number, the formula
    is the oracle.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        weight: Weight = 1.0,
        reduction: Literal["mean", "sum"] = "mean",
        eta_epochs: NonNegativeFloat = 60.0,
        eta_end: Share = 0.5,
        name: str = "stage_mse",
    ) -> None:
        super().__init__(name, pairs, weight)
        self.reduction = reduction
        self.eta_epochs, self.eta_end = eta_epochs, eta_end
        self.eta = cosine_decay(eta_epochs, eta_end)

    @override
    def bind(self, context: BindContext) -> None:
        """Refuse pairs of different shapes."""
        needs = zip(self.needs[::2], self.needs[1::2], strict=True)
        for (student, teacher), (one, other) in zip(needs, self.shapes(context), strict=True):
            if one != other:
                raise UserError(
                    f"losses.{self.name} compares tensors of one shape, but {student} is "
                    f"{list(one)} per image and {teacher} {list(other)}: choose other pairs, or "
                    "losses.fitnet, which has a connector"
                )

    @override
    def schedules(self) -> dict[str, Callable[[float], float]]:
        return {"eta": self.eta}

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """The sum over the pairs, times eta."""
        loss = super().forward(inputs).parts[self.name]
        return TermOutput({self.name: inputs.schedule["eta"] * loss})

    @override
    def compare(self, number: int, student: Tensor, teacher: Tensor) -> Tensor:
        rows = 1 if self.reduction == "mean" else len(student)
        return F.mse_loss(widened(student), widened(teacher), reduction=self.reduction) / rows
