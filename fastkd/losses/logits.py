"""Losses on logits as terms of a recipe: cross entropy and distillation (KD).

KD: Hinton et al. 2015, arXiv:1503.02531, section 2. The sum over two views is TLmixup / TLCutMix of
"Understanding the success of KD: a data augmentation perspective":
0.1 CE(x) + 0.9 [KL(x) + KL(x')].
"""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch.nn import functional as F

from fastkd.kernels import kd_loss
from fastkd.losses.registry import TermConfig
from fastkd.losses.term import LossTerm, TermInputs, TermOutput

__all__ = ["KD", "CrossEntropy", "CrossEntropyConfig", "KDConfig"]


class CrossEntropy(LossTerm):
    """Mean cross entropy of the student with the labels. Part: `<name>`."""

    def __init__(self, *, weight: float = 1.0, label_smoothing: float = 0.0, name: str = "ce"):
        super().__init__(name, ("x/student/logits",), {name: weight})
        self.label_smoothing = label_smoothing

    def forward(self, inputs: TermInputs) -> TermOutput:
        """Softmax in fp32 whatever the autocast type."""
        logits_NC = inputs.tensors["x/student/logits"].float()
        loss = F.cross_entropy(logits_NC, inputs.labels_N, label_smoothing=self.label_smoothing)
        return TermOutput({self.name: loss})


class KD(LossTerm):
    """T^2 KL(teacher || student) on each view, plus cross entropy with the labels on x.

    Parts: `<name>` (x), `<name>_xprime` (x', full weight, not averaged with x) and `ce` where
    ce_weight > 0; one pass of the fused kernel per view.
    """

    def __init__(
        self,
        *,
        weight: float = 0.9,
        ce_weight: float = 0.1,
        temperature: float = 4.0,
        label_smoothing: float = 0.0,
        views: tuple[str, ...] = ("x",),
        name: str = "kd",
    ) -> None:
        needs = tuple(f"{view}/{net}/logits" for view in views for net in ("student", "teacher"))
        weights = {name if view == "x" else f"{name}_{view}": weight for view in views}
        if ce_weight:
            weights["ce"] = ce_weight
            if "x" not in views:
                needs += ("x/student/logits",)
        super().__init__(name, needs, weights)
        self.temperature = temperature
        self.label_smoothing = label_smoothing
        self.views = views
        self.ce_weight = ce_weight

    def forward(self, inputs: TermInputs) -> TermOutput:
        """Means over the rows of each view."""
        parts = {}
        for view in self.views:
            with_labels = view == "x" and self.ce_weight
            kd_N, ce_N, _ = kd_loss(
                inputs.tensors[f"{view}/student/logits"],
                inputs.tensors[f"{view}/teacher/logits"],
                inputs.labels_N if with_labels else None,
                temperature=self.temperature,
                label_smoothing=self.label_smoothing,
            )
            parts[self.name if view == "x" else f"{self.name}_{view}"] = kd_N.mean()
            if with_labels:
                parts["ce"] = ce_N.mean()
        if self.ce_weight and "x" not in self.views:
            logits_NC = inputs.tensors["x/student/logits"].float()
            parts["ce"] = F.cross_entropy(
                logits_NC, inputs.labels_N, label_smoothing=self.label_smoothing
            )
        return TermOutput(parts)


class CrossEntropyConfig(TermConfig):
    """Keys of `losses.ce`."""

    weight: PositiveFloat
    """Factor in the total."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target spread over all classes."""

    def build(self, name: str) -> LossTerm:
        """The term."""
        return CrossEntropy(weight=self.weight, label_smoothing=self.label_smoothing, name=name)


class KDConfig(TermConfig):
    """Keys of `losses.kd`."""

    weight: PositiveFloat
    """Factor of T^2 KL, on each view."""
    ce_weight: NonNegativeFloat
    """Factor of the cross entropy with the labels."""
    temperature: PositiveFloat = 4.0
    """T of both softmaxes."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the hard target spread over all classes."""
    views: tuple[Literal["x", "xprime"], ...] = ("x",)
    """Views on which the student imitates the teacher."""

    def build(self, name: str) -> LossTerm:
        """The term."""
        return KD(name=name, **self.model_dump())
