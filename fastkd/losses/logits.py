"""Losses on logits as terms of a recipe: cross entropy, distillation (KD), soft cross entropy.

KD: Hinton et al. 2015, arXiv:1503.02531, section 2. The sum over two views is TLmixup / TLCutMix of
"Understanding the success of KD: a data augmentation perspective":
0.1 CE(x) + 0.9 [KL(x) + KL(x')]. Logit standardisation: Sun et al. 2024, arXiv:2403.01427.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fastkd.config.section import Since
from fastkd.data.batch import NO_LABEL
from fastkd.errors import UserError
from fastkd.kernels import kd_loss
from fastkd.kernels.kd_loss import rows_that_count
from fastkd.losses.base.arguments import STATED, Smoothing, Weight
from fastkd.losses.base.dtypes import widened
from fastkd.losses.base.needs import (
    MIXED_LABELS,
    MIXED_LOGITS,
    STUDENT_LOGITS,
    TEACHER_LOGITS,
    Need,
    View,
    both_logits,
)
from fastkd.losses.base.term import BindContext, LossTerm, TermInputs, TermOutput
from fastkd.losses.cross_entropy import (
    ClassWeights,
    check_hard_labels,
    class_weights_C,
    labelled_ce,
    weighted_mean,
)
from fastkd.losses.drop_in import KDLoss

__all__ = ["KD", "CrossEntropy", "MixedCE", "SoftCE", "standardize"]

Target = Literal["teacher", "mixed_logits"]
_STUDENT = str(STUDENT_LOGITS)


def standardize(logits_NC: Tensor) -> Tensor:
    """Every row to zero mean and unit (unbiased) standard deviation, in fp32; fp64 stays.

    (z - mean) / (std + 1e-7): a student then matches the teacher's order and relations, not the
    size of its logits (arXiv:2403.01427).
    """
    z_NC = widened(logits_NC)
    centred_NC = z_NC - z_NC.mean(1, keepdim=True)
    return centred_NC / (z_NC.std(1, keepdim=True) + 1e-7)


class CrossEntropy(LossTerm):
    """Cross entropy of the student with the labels.

        loss = -mean over rows of log p_student[label],  p = softmax(logits)

    With `label_smoothing` e the label counts 1 - e and every class e / C more. Labels may be rows
    of probabilities, as MixUp and CutMix make them. With dense logits [N, C, H, W] a row is a
    pixel. Rows labelled -100 count in neither the sum nor the divisor; an epoch without any other
    label has failed where every loss reads labels. With several processes, or with accumulate, each
    rank or micro-batch divides by its own number of rows. Part: `<name>`.

    With `class_weights` w the mean is sum of w[label] * row / sum of w[label], as in torch.
    "erfnet" is w_c = 1 / ln(1.10 + p_c), p_c the share of class c among the labelled pixels (or
    images) of the training set: ERFNet's formula. "erfnet_encoder" has 1.20, from which the list
    that ERFNet's code has for its encoder's stage follows. Both released lists count the pixels
    without a class in the whole (11.5% of Cityscapes), so they differ a little from these. A row
    smoothed by `label_smoothing` counts by its label, where torch weighs each of its classes.

    Args:
        weight: Factor in the total.
        label_smoothing: Share of the target spread over all classes.
        class_weights: How much a row counts by its class: none (equally), erfnet, erfnet_encoder,
            or a list of one number per class.

    Source: `torch.nn.functional.cross_entropy`. class_weights: Romera et al. 2018, "ERFNet",
    section IV, after ENet, arXiv:1606.02147, section 5.2; Eromera/erfnet_pytorch train/main.py.
    Needs: the student's logits on x, and the labels.
    Weight: 1.
    Tests: tests/training/test_trainer.py, tests/ops/test_kd_loss.py,
    tests/losses/test_peer_losses.py, test_dense_logits.py, test_class_weights.py,
    test_terms_on_ranks.py; oracle logit_losses.json.
    """

    label_kind = "class"
    takes_no_label = True
    takes_soft_labels = True
    takes_pixels = True
    class_weight_C: Tensor | None

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        label_smoothing: Smoothing = 0.0,
        class_weights: Annotated[ClassWeights, Since("0.2")] = "none",
        name: str = "ce",
    ) -> None:
        super().__init__(name, self.needs_of(), {name: weight})
        self.label_smoothing = label_smoothing
        self.class_weights: ClassWeights = class_weights
        self.takes_soft_labels = class_weights == "none"
        self.register_buffer("class_weight_C", None)

    @override
    @classmethod
    def needs_of(cls, **keys: Any) -> tuple[Need, ...]:
        return (STUDENT_LOGITS,)

    @override
    def bind(self, context: BindContext) -> None:
        """Keep the weights of the classes, which a resumed run finds in its checkpoint."""
        if self.class_weights != "none":
            self.class_weight_C = class_weights_C(self.class_weights, self.name, context)

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """Softmax in fp32 whatever the autocast type."""
        (logits_NC,) = self.wanted(inputs)
        if self.class_weight_C is not None:
            check_hard_labels(self.name, inputs.labels_N)
        loss = labelled_ce(
            logits_NC, inputs.labels_N, self.label_smoothing, self.class_weight_C, self.weight
        )
        return TermOutput({self.name: loss})


class KD(LossTerm):
    """Distillation by logits on each view, plus cross entropy with the labels on x.

        kd = T^2 mean over rows of KL(softmax(teacher / T) || softmax(student / T))
        loss = weight * sum over views of kd + ce_weight * CE(x)

    Parts: `<name>` (x), `<name>_xprime` (x', full weight, not averaged with x) and `ce` where
    ce_weight > 0; one pass of the fused kernel per view. `standardize` takes both logits of the KL,
    not of the cross entropy, to zero mean and unit deviation first; its paper has T 2, weight 9.
    Labels may be rows of probabilities, as MixUp and CutMix make them. With dense logits
    [N, C, H, W] a row is a pixel.

    Images without a label (-100): with ce_weight=0 the loss reads no labels, and every image
    counts, as in `KDLoss` without labels. With ce_weight > 0 a row labelled -100 counts in neither
    a sum nor the divisor, as in `KDLoss` with labels, so the teacher would not be imitated on it
    either: training refuses such an image. [KD(ce_weight=0), CrossEntropy(weight=0.1)] is the way
    out; there it counts in the KL alone. The same holds for the pixels of label maps, of which
    some have no class as a rule and none is refused. With several processes, or with accumulate,
    each rank or micro-batch divides by its own number of rows.

    xprime_target: what is imitated on x': "teacher", its logits of x' (TLmixup, TLCutMix), or
    "mixed_logits", its logits of the two images, mixed like their pixels, which the released code
    of the data augmentation paper calls plain CutMix and mixup.

    Args:
        weight: Factor of T^2 KL, on each view.
        ce_weight: Factor of the cross entropy with the labels.
        temperature: T of both softmaxes.
        label_smoothing: Share of the hard target spread over all classes.
        views: Views on which the student imitates the teacher.
        xprime_target: On x': the teacher's logits of x', or its logits of the two images, mixed
            like their pixels.
        standardize: Take both logits of the KL to zero mean and unit deviation per sample first.
        class_weights: How much a row counts in the cross entropy by its class, as in
            `CrossEntropy`; the KL is not weighted.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2; HobbitLong/RepDistiller
    distiller_zoo/KD.py. standardize: Sun et al. 2024, arXiv:2403.01427, section 4;
    sunshangquan/logit-standardization-KD mdistiller/distillers/KD.py.
    Needs: the logits of both networks on every view of `views`, and the labels.
    Weight: 0.9, and ce_weight 0.1, RepDistiller's.
    Tests: tests/ops/test_kd_loss.py, oracle kd_loss_oracle.json; tests/losses/test_logit_losses.py,
    test_peer_losses.py, test_mixed_targets.py, test_dense_logits.py, test_class_weights.py,
    test_terms_on_ranks.py, oracles logit_losses.json, peer_losses.json (the authors' code).
    """

    takes_soft_labels = True
    takes_pixels = True
    class_weight_C: Tensor | None

    def __init__(  # noqa: PLR0913 - the keys of a recipe
        self,
        *,
        weight: Weight = 0.9,
        ce_weight: Annotated[NonNegativeFloat, STATED] = 0.1,
        temperature: PositiveFloat = 4.0,
        label_smoothing: Smoothing = 0.0,
        views: tuple[View, ...] = ("x",),
        xprime_target: Target = "teacher",
        standardize: bool = False,
        class_weights: Annotated[ClassWeights, Since("0.2")] = "none",
        name: str = "kd",
    ) -> None:
        if class_weights != "none" and not ce_weight:
            raise UserError(
                f"losses.{name}.class_weights weighs its cross entropy, which ce_weight=0 leaves "
                f"out: set losses.{name}.ce_weight, or losses.ce.class_weights"
            )
        needs = self.needs_of(views=views, xprime_target=xprime_target, ce_weight=ce_weight)
        weights = self.weights_of(name, weight=weight, views=views, ce_weight=ce_weight)
        super().__init__(name, needs, weights)
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.views = tuple(views)
        # Per view: its name, and the keys under which the step has the two logits.
        self.compared = [
            (view, str(Need.of(view, "student", "logits")), str(_target(view, xprime_target)))
            for view in views
        ]
        self.standardize = standardize
        self.ce_weight = ce_weight
        self.label_kind = "class" if ce_weight else None
        # A row without a label would not count in the KL either.
        self.takes_no_label = not ce_weight
        self.class_weights: ClassWeights = class_weights
        self.takes_soft_labels = class_weights == "none"
        self.register_buffer("class_weight_C", None)

    @override
    @classmethod
    def needs_of(
        cls, *, views: Sequence[View], xprime_target: Target, ce_weight: float, **keys: Any
    ) -> tuple[Need, ...]:
        targets = [_target(view, xprime_target) for view in views]
        students = [Need.of(view, "student", "logits") for view in views]
        needs = [need for pair in zip(students, targets, strict=True) for need in pair]
        if xprime_target == "mixed_logits":
            if "xprime" not in views:
                raise UserError(
                    "xprime_target=mixed_logits applies to x', which is missing from views: "
                    "give views x and xprime"
                )
            # They are mixed from the teacher's logits of x.
            needs = [*students, *targets, *([] if "x" in views else [TEACHER_LOGITS])]
        if ce_weight and "x" not in views:
            needs.append(STUDENT_LOGITS)
        return tuple(needs)

    @override
    @classmethod
    def weights_of(
        cls, name: str, *, weight: float, views: Sequence[View], ce_weight: float, **keys: Any
    ) -> dict[str, float]:
        weights = {_part(name, view): weight for view in views}
        return weights | {"ce": ce_weight} if ce_weight else weights

    @override
    def bind(self, context: BindContext) -> None:
        """As `CrossEntropy`."""
        if self.class_weights != "none":
            self.class_weight_C = class_weights_C(self.class_weights, self.name, context)

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """Means over the rows of each view."""
        parts = {}
        labels_N, weight_C = inputs.labels_N, self.class_weight_C
        if weight_C is not None:
            check_hard_labels(self.name, labels_N)
        for view, student, teacher in self.compared:
            student_NC, teacher_NC = inputs.tensors[student], inputs.tensors[teacher]
            if self.standardize:
                student_NC, teacher_NC = standardize(student_NC), standardize(teacher_NC)
            with_labels = view == "x" and self.ce_weight and not self.standardize
            counts_N = None
            # Rows of probabilities have none to ignore.
            if view == "x" and self.ce_weight and not labels_N.is_floating_point():
                counts_N = rows_that_count(labels_N, labels_N, None, NO_LABEL)
            kd_N, ce_N, _ = kd_loss(
                student_NC,
                teacher_NC,
                labels_N if with_labels else None,
                temperature=self.temperature,
                label_smoothing=self.label_smoothing,
                ignore_index=NO_LABEL,
                class_dim=1,
                mask=None if with_labels else counts_N,
            )
            rows = kd_N.numel() if counts_N is None else counts_N.sum().clamp_min(1)
            parts[_part(self.name, view)] = kd_N.sum() / rows
            if with_labels and weight_C is not None:
                parts["ce"] = weighted_mean(ce_N, labels_N, weight_C)
            elif with_labels:
                parts["ce"] = ce_N.sum() / rows
        if self.ce_weight and "ce" not in parts:
            logits_NC = inputs.tensors[_STUDENT]
            parts["ce"] = labelled_ce(logits_NC, labels_N, self.label_smoothing, weight_C)
        return TermOutput(parts)


def _part(name: str, view: str) -> str:
    return name if view == "x" else f"{name}_{view}"


def _target(view: View, xprime_target: Target) -> Need:
    """What the student imitates on a view."""
    if view == "xprime" and xprime_target == "mixed_logits":
        return MIXED_LOGITS
    return Need.of(view, "teacher", "logits")


class MixedCE(LossTerm):
    """Cross entropy of the student on x' with the labels of the images that x' is mixed from.

        loss = mean over rows of stays * CE(x', y) + (1 - stays) * CE(x', y_partner)

    `stays` is lambda of mixup, and for CutMix the share of pixels that the box, clipped to the
    image, leaves. An x' made from one image, as in Cutout, has its label. Added to KL on both views
    it is one reading of the data augmentation paper's "KD+CutMix"; the other is KD's
    `xprime_target`.

    Args:
        weight: Factor in the total.

    Source: Zhang et al. 2018, arXiv:1710.09412, section 2; Yun et al. 2019, arXiv:1905.04899,
    section 3.1; clovaai/CutMix-PyTorch train.py.
    Needs: the student's logits on x' and the mixed labels.
    Weight: 1, the references'; 0.9 together with KD, as in the data augmentation paper's code.
    Tests: tests/losses/test_mixed_targets.py, tests/augment/test_mix.py,
    tests/training/test_two_ranks.py; no released number, the formula is the oracle.
    """

    label_kind = "class"
    takes_soft_labels = True

    def __init__(self, *, weight: Weight = 1.0, name: str = "mixed_ce") -> None:
        super().__init__(name, self.needs_of(), {name: weight})

    @override
    @classmethod
    def needs_of(cls, **keys: Any) -> tuple[Need, ...]:
        return Need.of("xprime", "student", "logits"), MIXED_LABELS

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """By linearity the cross entropy with the mixed one-hot rows; softmax in fp32."""
        logits_NC, labels_NC = self.wanted(inputs)
        logits_NC = widened(logits_NC)
        return TermOutput({self.name: F.cross_entropy(logits_NC, labels_NC.to(logits_NC.dtype))})


class SoftCE(LossTerm):
    """Cross entropy of the student with the teacher's probabilities at T.

        loss = -T^2 mean over rows of sum over classes of p_teacher * log p_student

    This is KD plus the teacher's entropy, a constant. With T = 1 and weight 1 it is the similarity
    loss of MEAL V2, whose only other loss is `Discriminator`.

    Args:
        weight: Factor in the total; 1 in MEAL V2.
        temperature: T of both softmaxes.
        view: View on which the student imitates the teacher.

    Source: Shen and Savvides 2020, arXiv:2009.08453, Eq. 3; szq0214/MEAL-V2 extensions/kd_loss.py.
    Needs: the logits of both networks on `view`.
    Weight: 1, the reference's.
    Tests: tests/losses/test_logit_losses.py, test_terms_on_ranks.py, tests/ops/test_kd_modules.py;
    oracle kd_presets.json (the authors' code).
    """

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        temperature: PositiveFloat = 1.0,
        view: View = "x",
        name: str = "soft_ce",
    ) -> None:
        super().__init__(name, self.needs_of(view=view), {name: weight})
        self.temperature = temperature
        self.loss = KDLoss.preset("meal_v2", temperature=temperature)

    @override
    @classmethod
    def needs_of(cls, *, view: View, **keys: Any) -> tuple[Need, ...]:
        return both_logits(view)

    @override
    def forward(self, inputs: TermInputs) -> TermOutput:
        """Mean over the rows."""
        student_NC, teacher_NC = self.wanted(inputs)
        return TermOutput({self.name: self.loss(student_NC, teacher_NC)})
