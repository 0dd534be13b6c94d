"""Drop-in loss modules for any training loop: `KDLoss` (fused, raw logits) and `KLDivLoss`.

    KDLoss = mean over rows of (1 - alpha) CE(student, labels) + alpha T^2 KL(teacher || student)

Hinton et al. 2015, arXiv:1503.02531. Packages weight and average these two terms differently;
`KDLoss.preset` names the conventions. The work is done by `fastkd.kernels.kd_loss`.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Annotated, Any, Literal, get_args

import torch
from annotated_types import Ge, Le
from pydantic import PositiveFloat
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.kernels import kd_loss, kd_loss_mean
from fastkd.kernels.kd_loss import rows_that_count
from fastkd.losses.base.arguments import check_argument

__all__ = ["KDLoss", "KLDivLoss", "Preset"]

Reduction = Literal["mean", "sum", "none"]
Preset = Literal["repdistiller", "mdistiller", "timm", "deit", "modelopt", "moonshine", "meal_v2"]

# What each package computes at its defaults, read from the source files named.
_PRESETS: dict[Preset, dict[str, Any]] = {
    # HobbitLong/RepDistiller distiller_zoo/KD.py, scripts: -r 0.1 -a 0.9, --kd_T 4
    "repdistiller": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9},
    # megvii-research/mdistiller mdistiller/distillers/KD.py, engine/cfg.py
    "mdistiller": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9},
    # timm/task/distillation.py, LogitDistillationTask with neither weight given
    "timm": {"temperature": 1.0, "ce_weight": 1.0, "kd_weight": 1.0},
    # facebookresearch/deit losses.py, "soft": the sum is divided by N * C
    "deit": {"temperature": 1.0, "ce_weight": 0.5, "kd_weight": 0.5, "per_class": True},
    # NVIDIA/Model-Optimizer modelopt/torch/distill/losses.py: reduction "mean", no labels
    "modelopt": {"temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0, "per_class": True},
    # BayesWatch/pytorch-moonshine funcs.py: 2 alpha T^2 times the mean over N * C elements
    "moonshine": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 1.8, "per_class": True},
    # szq0214/MEAL-V2 extensions/kd_loss.py: cross entropy with the teachers' mean, no labels
    "meal_v2": {
        "temperature": 1.0,
        "ce_weight": 0.0,
        "kd_weight": 1.0,
        "keep_teacher_entropy": True,
    },
}


class KDLoss(nn.Module):
    """Distillation loss from raw logits, forward and backward in one fused pass.

        loss = KDLoss(temperature=4.0, alpha=0.9)(student_logits, teacher_logits, labels)

    Args:
        temperature: T, above 0. The cross entropy is taken at temperature 1.
        alpha: share of the distillation term, 0 to 1; the cross entropy has 1 - alpha.
        ce_weight: weight of the cross entropy in place of 1 - alpha.
        kd_weight: weight of T^2 * KL in place of alpha.
        per_class: divide the KL by the number of classes too, as `reduction="mean"` of
            `nn.KLDivLoss` does; its gradient is C times weaker.
        keep_teacher_entropy: report T^2 * cross entropy with the teacher instead of T^2 * KL. Adds
            the teacher's entropy, a constant: the gradient is the same.
        label_smoothing: share of the hard target spread over all classes, 0 to 1.
        ignore_index: rows with this label count in neither the terms nor the divisor.
        reduction: "mean" over rows, "sum", or "none" (one value per row, 0 where ignored).
        class_dim: 1 as in `nn.CrossEntropyLoss` ([N, C] or [N, C, H, W]), or -1 for [..., C].
        check: check the values too (labels in range or probabilities, logits that are not
            probabilities); this waits for the device, so use it for debugging.
    """

    def __init__(  # noqa: PLR0913 - a frozen public signature
        self,
        temperature: float = 4.0,
        alpha: float = 0.9,
        *,
        ce_weight: float | None = None,
        kd_weight: float | None = None,
        per_class: bool = False,
        keep_teacher_entropy: bool = False,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        class_dim: int = 1,
        check: bool = False,
    ) -> None:
        super().__init__()
        for argument, kind, value in (
            ("temperature", PositiveFloat, temperature),
            ("label_smoothing", Annotated[float, Ge(0), Le(1)], label_smoothing),
            ("alpha", float, alpha),
            ("ce_weight", float | None, ce_weight),
            ("kd_weight", float | None, kd_weight),
        ):
            check_argument("KDLoss", argument, kind, value)
        if not 0 <= alpha <= 1:
            raise UserError(
                f"KDLoss: got alpha={alpha}; expected 0 to 1. For weights that do not sum to 1 "
                "pass ce_weight= and kd_weight="
            )
        if reduction not in get_args(Reduction):
            raise UserError(
                f"KDLoss: got reduction={reduction!r}; expected 'mean' (over rows), 'sum' or "
                "'none'. nn.KLDivLoss calls the first 'batchmean'; per_class=True divides by C too"
            )
        self.temperature = temperature
        self.ce_weight = 1 - alpha if ce_weight is None else ce_weight
        self.kd_weight = alpha if kd_weight is None else kd_weight
        self.per_class = per_class
        self.keep_teacher_entropy = keep_teacher_entropy
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.class_dim = class_dim
        self.check = check

    @classmethod
    def preset(cls, name: Preset, **overrides: Any) -> "KDLoss":
        """The loss as another package computes it at its defaults; keyword arguments override.

        Raises:
            ValueError: the name is unknown (the message lists the known ones), or `alpha` is
                given: presets set the two weights, ce_weight and kd_weight.
        """
        if name not in _PRESETS:
            raise UserError(
                f"KDLoss.preset: got {name!r}; expected one of {', '.join(sorted(_PRESETS))}"
            )
        if "alpha" in overrides:
            raise UserError(
                "KDLoss.preset: got alpha; expected ce_weight and kd_weight, which presets set"
            )
        return cls(**{**_PRESETS[name], **overrides})

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            student_logits: [N, C], [N, C, ...] or, with class_dim=-1, [..., C].
            teacher_logits: the same shape; a list of up to 4 is averaged in probability.
            labels: int64 without the class dimension, or probabilities of the logits' shape;
                None drops the cross entropy only.
            weights: per row or per sample [N], multiplies both terms, not the divisor.
            mask: bool, per row or per sample [N]; False drops the row from sum and divisor.

        Returns:
            A scalar, or one value per row with reduction="none"; fp32 (fp64 if an input is).

        Raises:
            ValueError: inputs that do not fit, see `fastkd.kernels.kd_loss`.
        """
        kd_weight = self.kd_weight
        if self.per_class:
            kd_weight = kd_weight / student_logits.shape[self.class_dim]
        if self.ce_weight == 0 and labels is not None:
            # Nothing to compute from them, but ignored rows stay out of the divisor.
            if not labels.is_floating_point():
                mask = rows_that_count(labels, labels, mask, self.ignore_index)
            labels = None
        common: dict[str, Any] = {
            "temperature": self.temperature,
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
            "class_dim": self.class_dim,
            "weights": weights,
            "mask": mask,
            "check": self.check,
        }
        if self.reduction == "mean" and not self.keep_teacher_entropy:
            return kd_loss_mean(
                student_logits,
                teacher_logits,
                labels,
                kd_weight=kd_weight,
                ce_weight=self.ce_weight,
                **common,
            )
        rows = kd_loss(student_logits, teacher_logits, labels, **common)
        loss = kd_weight * rows.kd
        if labels is not None:
            loss = loss + self.ce_weight * rows.ce
        counts = rows_that_count(rows.kd, labels, mask, self.ignore_index)
        if self.keep_teacher_entropy:
            entropy = kd_weight * self._teacher_entropy(teacher_logits).to(loss.dtype)
            if weights is not None:
                entropy = entropy * weights.reshape(
                    weights.shape + (1,) * (loss.dim() - weights.dim())
                )
            loss = loss + torch.where(counts, entropy, 0)
        if self.reduction == "none":
            return loss
        return loss.sum() if self.reduction == "sum" else loss.sum() / counts.sum().clamp_min(1)

    def _teacher_entropy(self, teacher_logits: Tensor | Sequence[Tensor]) -> Tensor:
        """T^2 times the entropy of the teachers' mean distribution, per row."""
        one = isinstance(teacher_logits, Tensor)
        teachers = [teacher_logits] if one else list(teacher_logits)
        wide = torch.promote_types(teachers[0].dtype, torch.float32)
        with torch.no_grad():
            p = sum((t.to(wide) / self.temperature).softmax(self.class_dim) for t in teachers)
            assert isinstance(p, Tensor)
            return self.temperature**2 * torch.special.entr(p / len(teachers)).sum(self.class_dim)

    def extra_repr(self) -> str:
        """For `print`: temperature and weights, then everything that is not at its default."""
        given = signature(type(self)).parameters
        weights = ("temperature", "alpha", "ce_weight", "kd_weight")
        others = {name: getattr(self, name) for name in given if name not in weights}
        changed = [
            f", {name}={one!r}" for name, one in others.items() if one != given[name].default
        ]
        return (
            f"temperature={self.temperature:g}, ce_weight={self.ce_weight:g}, "
            f"kd_weight={self.kd_weight:g}{''.join(changed)}"
        )


class KLDivLoss(nn.KLDivLoss):
    """`nn.KLDivLoss` under another import: same signature, numbers, reductions and gradients.

    `forward(input, target)` takes log-probabilities and probabilities (or log-probabilities with
    log_target=True), the student first. It runs torch's own kernels and catches the mistakes that
    torch does not: with check=True, probabilities or logits in place of log-probabilities and
    a swapped order are errors (this waits for the device). From raw logits, `KDLoss` is faster.
    """

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
        *,
        check: bool = False,
    ) -> None:
        super().__init__(size_average, reduce, reduction, log_target)
        self.check = check

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """KL(target || exp(input)), see `torch.nn.KLDivLoss`.

        Raises:
            ValueError: with check=True, input or target is not what the arguments say.
        """
        if self.check:
            self._check("input", input, log=True)
            self._check("target", target, log=self.log_target)
        return super().forward(input, target)

    def _check(self, name: str, x: Tensor, log: bool) -> None:
        wanted = "log-probabilities (log_softmax)" if log else "probabilities (softmax)"
        wrong = (x > 1e-6).any() if log else ((x < 0) | (x > 1 + 1e-6)).any()
        if x.numel() and bool(wrong.item()):
            raise UserError(
                f"KLDivLoss: {name} is outside the range of {wanted}: values from "
                f"{x.min().item():g} to {x.max().item():g}. The order is (input, target): "
                "log-probabilities of the student, then the teacher"
            )
