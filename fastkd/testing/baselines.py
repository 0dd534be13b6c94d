"""Formulas in plain torch, as most training loops write them: what fastkd is compared with."""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "eager_attention_loss",
    "eager_dense_loss",
    "eager_hardness",
    "eager_kd_loss",
    "eager_kd_rows",
    "eager_step_rows",
    "freshly_compiled",
]


def eager_kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    alpha: float = 0.9,
) -> Tensor:
    """The scalar loss; classes are in dimension 1."""
    kl = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.softmax(teacher / temperature, dim=1),
        reduction="none",
    )
    kd = kl.sum(1).mean() * temperature**2
    return (1 - alpha) * F.cross_entropy(student, labels) + alpha * kd


def eager_dense_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    class_weights: Tensor,
    *,
    temperature: float = 4.0,
    kd_weight: float = 0.9,
    ce_weight: float = 0.1,
) -> Tensor:
    """The scalar loss of logits [N, C, H, W] and labels [N, H, W], -100 where there is none.

    A part of weight 0 is not computed. With labels the KL counts where they do.
    """
    loss = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
    if kd_weight:
        log_p = F.log_softmax(student / temperature, dim=1)
        kl = F.kl_div(log_p, F.softmax(teacher / temperature, dim=1), reduction="none").sum(1)
        if ce_weight:
            kl = kl[labels != -100]
        loss = loss + kd_weight * temperature**2 * kl.mean()
    if ce_weight:
        weight = class_weights.to(student.dtype)
        loss = loss + ce_weight * F.cross_entropy(student, labels, weight, ignore_index=-100)
    return loss


def eager_kd_rows(
    student: Tensor, teachers: list[Tensor], labels: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """(kd, ce) per row of [N, C] logits."""
    log_p_s = F.log_softmax(student / temperature, dim=1)
    p_t = torch.stack([F.softmax(t / temperature, dim=1) for t in teachers]).mean(0)
    kd = F.kl_div(log_p_s, p_t, reduction="none").sum(1) * temperature**2
    if labels is None:
        return kd, torch.zeros_like(kd)
    return kd, F.cross_entropy(student, labels, reduction="none")


@torch.no_grad()
def eager_step_rows(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    dtype: torch.dtype,
    temperature: float = 4.0,
) -> tuple[Tensor, Tensor]:
    """(kd, ce) per image of a training step, which leaves both networks as they were.

    dtype: float64 for the truth, otherwise the autocast type.
    """
    student, teacher = copy.deepcopy(student).train(), copy.deepcopy(teacher).eval()
    if dtype == torch.float64:
        logits, target = student.double()(images.double()), teacher.double()(images.double())
    else:
        images = images.float()
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            logits, target = student(images), teacher(images)
        logits, target = logits.float(), target.float()
    return eager_kd_rows(logits, [target], labels, temperature)


def eager_hardness(
    student: Tensor, teacher: Tensor, labels: Tensor, criterion: str, temperature: float = 4.0
) -> Tensor:
    """Scores per row of [N, C] logits."""
    if criterion == "kl":
        log_p_s = F.log_softmax(student / temperature, dim=1)
        p_t = F.softmax(teacher / temperature, dim=1)
        return F.kl_div(log_p_s, p_t, reduction="none").sum(1)
    if criterion in ("teacher_entropy", "student_entropy"):
        log_p = F.log_softmax(teacher if criterion == "teacher_entropy" else student, dim=1)
        return -(log_p.exp() * log_p).sum(1)
    if criterion == "cross_entropy":
        return F.cross_entropy(student, labels, reduction="none")
    assert criterion == "margin"
    is_label = F.one_hot(labels, student.shape[1]).bool()
    return student.masked_fill(is_label, -math.inf).amax(1) - student[is_label]


def eager_attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The scalar attention-transfer loss for features of one spatial size."""

    def attention(x: Tensor) -> Tensor:
        return F.normalize(x.pow(2).mean(1).flatten(1))

    return (attention(student) - attention(teacher)).pow(2).mean()


def freshly_compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compile(dynamic=False)` with an empty cache.

    With a full one (its recompile limit) torch.compile silently runs eager code.
    """
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)
