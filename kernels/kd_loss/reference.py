"""The slow honest version of `kd_loss`: plain torch, any device, any dtype, twice differentiable.

    kd = T^2 * sum_c p_t (log p_t - log p_s),   p = softmax(z / T)
    ce = - sum_c y_c log softmax(z_s)_c

Hinton et al. 2015, arXiv:1503.02531.
It runs where no kernel does, and the kernels are tested against it in float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.kernels.kd_loss.inputs import Inputs

__all__ = ["kd_loss_reference"]


def kd_loss_reference(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row `(kd, ce, agree)` of prepared inputs."""
    student, teachers, labels, temperature, label_smoothing, ignore_index, class_dim, *_ = inputs
    wide = torch.promote_types(student.dtype, torch.float32)
    for teacher in teachers:
        wide = torch.promote_types(wide, teacher.dtype)
    rows = student.movedim(class_dim, -1).shape[:-1]
    counts = torch.ones(rows, dtype=torch.bool, device=student.device)
    if inputs.mask is not None:
        counts = counts & inputs.mask
    hard = labels is not None and not labels.is_floating_point()
    if labels is not None and hard:
        counts = counts & (labels != ignore_index)
    counts_R1 = counts.unsqueeze(-1)

    def counted(logits: Tensor) -> Tensor:
        # A row that does not count may hold NaN, which 0 times its gradient would be too.
        return torch.where(counts_R1, logits.movedim(class_dim, -1).to(wide), 0)

    student_RC = counted(student)
    kd = student_RC.new_zeros(rows)
    agree = student_RC.new_zeros(rows)
    if teachers:
        teachers_RC = [counted(t.detach()) for t in teachers]
        kd = temperature**2 * _kl(student_RC / temperature, [t / temperature for t in teachers_RC])
        if len(teachers_RC) == 1:
            best = teachers_RC[0].argmax(-1)
        else:
            best = sum((t / temperature).softmax(-1) for t in teachers_RC).argmax(-1)  # type: ignore[union-attr]
        agree = (student_RC.argmax(-1) == best).to(wide)

    ce = student_RC.new_zeros(rows)
    if labels is not None and hard:
        # Rows that do not count take class 0 here and nothing below.
        safe = torch.where(counts, labels, 0)
        ce = _cross_entropy(student_RC, safe, label_smoothing)
    elif labels is not None:
        ce = _cross_entropy(student_RC, counted(labels.detach()), label_smoothing)

    scale = counts.to(wide)
    if inputs.weights is not None:
        scale = torch.where(counts, inputs.weights.to(wide), 0)
    kd, ce = (torch.where(counts, part * scale, 0) for part in (kd, ce))
    return kd, ce, torch.where(counts, agree, 0)


def _cross_entropy(logits_RC: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    classes = logits_RC.shape[-1]
    rows = logits_RC.shape[:-1]
    flat = labels.reshape(-1, classes).to(logits_RC.dtype) if labels.is_floating_point() else labels
    ce = F.cross_entropy(
        logits_RC.reshape(-1, classes),
        flat if labels.is_floating_point() else flat.reshape(-1),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return ce.reshape(rows)


def _kl(x_s: Tensor, x_t: list[Tensor]) -> Tensor:
    """KL(mean_k softmax(x_t[k]) || softmax(x_s)) over the last dimension, never below 0."""
    lse_s = x_s.logsumexp(-1)
    if len(x_t) == 1:
        # E_t[x_t - x_s] - (lse_t - lse_s): for equal logits the two halves of its gradient are
        # equal to the last bit; through log_softmax they would not be.
        lse_t = x_t[0].logsumexp(-1)
        p_t = (x_t[0] - lse_t.unsqueeze(-1)).exp()
        gap = torch.where(p_t > 0, x_t[0] - x_s, 0)
        kl = (p_t * gap).sum(-1) - (lse_t - lse_s)
        # Its value cancels near equality. With sum p_s - sum p_t = 0 added it does not.
        with torch.no_grad():
            p_s = (x_s - lse_s.unsqueeze(-1)).exp()
            ratio = torch.where(p_t > 0, gap - (lse_t - lse_s).unsqueeze(-1), 0)
            value = (p_t * ratio - (p_t - p_s)).sum(-1).clamp_min(0)
        return value + (kl - kl.detach())
    p_t = torch.stack([x.softmax(-1) for x in x_t]).mean(0)
    cross = torch.where(p_t > 0, p_t * (x_s - lse_s.unsqueeze(-1)), 0)
    return (torch.special.xlogy(p_t, p_t) - cross).sum(-1).clamp_min(0)
