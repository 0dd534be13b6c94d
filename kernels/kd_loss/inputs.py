"""What `kd_loss` accepts: checks that need no look at a value and, on request, those that do."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Inputs", "prepare", "rows_that_count"]

MAX_TEACHERS = 4


class Inputs(NamedTuple):
    """The arguments that the reference and all ops of this folder begin with, in their order."""

    student: Tensor
    teachers: list[Tensor]
    labels: Tensor | None
    """int64 class indices, or probabilities of the logits' shape."""
    weights: Tensor | None
    """One per row."""
    mask: Tensor | None
    temperature: float
    label_smoothing: float
    ignore_index: int
    class_dim: int
    """-1 or 1."""


def rows_that_count(
    like: Tensor, labels: Tensor | None, mask: Tensor | None, ignore_index: int
) -> Tensor:
    """Bool, the shape of `like` (one value per row): rows neither ignored nor masked."""
    counts = torch.ones_like(like, dtype=torch.bool)
    if mask is not None:
        counts = counts & mask.reshape(mask.shape + (1,) * (like.dim() - mask.dim()))
    if labels is not None and not labels.is_floating_point():
        counts = counts & (labels != ignore_index)
    return counts


def prepare(
    student: Tensor,
    teacher: Tensor | Sequence[Tensor] | None,
    labels: Tensor | None,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    class_dim: int,
    weights: Tensor | None,
    mask: Tensor | None,
    check: bool,
) -> Inputs:
    """Checks what can be checked without waiting for a device, and orders the arguments."""
    if teacher is None:
        teachers: list[Tensor] = []
    elif isinstance(teacher, Tensor):
        teachers = [teacher]
    else:
        teachers = list(teacher)
    if student.dim() < 2 or class_dim not in (-1, 1, student.dim() - 1):
        raise ValueError(
            f"kd_loss: got student logits {_shape(student)} with class_dim={class_dim}; expected "
            "[N, C] or [..., C] with class_dim=-1, or [N, C, ...] with class_dim=1"
        )
    if class_dim == student.dim() - 1:
        class_dim = -1
    classes = student.shape[class_dim]
    if classes < 2:
        raise ValueError(
            f"kd_loss: got {classes} classes (dimension {class_dim} of {_shape(student)}); "
            "expected at least 2. Are the classes in another dimension (class_dim)?"
        )
    if len(teachers) > MAX_TEACHERS:
        raise ValueError(
            f"kd_loss: got {len(teachers)} teachers; expected at most {MAX_TEACHERS}. "
            "Average the rest in probability yourself and pass log-probabilities as one teacher"
        )
    for name, x in (("student", student), *(("teacher", t) for t in teachers)):
        if not x.is_floating_point():
            raise ValueError(f"kd_loss: {name} logits are {x.dtype}; expected floating point")
    for t in teachers:
        if t.shape != student.shape:
            raise ValueError(
                f"kd_loss: student logits are {_shape(student)} but teacher logits are "
                f"{_shape(t)}; both must have one shape. Do the models share a class list?"
            )
        if t.requires_grad and not student.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "kd_loss: the teacher's logits require grad and the student's do not; the order is "
                "kd_loss(student, teacher, labels). Swap them, or detach both"
            )
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"kd_loss: got temperature={temperature}; expected a finite number above 0"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"kd_loss: got label_smoothing={label_smoothing}; expected 0 to 1")
    rows = student.shape[:-1] if class_dim == -1 else student.shape[:1] + student.shape[2:]
    if labels is not None and labels.is_floating_point():
        if labels.shape != student.shape:
            raise ValueError(
                f"kd_loss: labels are probabilities of shape {_shape(labels)}; expected the shape "
                f"of the logits, {_shape(student)} (or class indices as int64)"
            )
    elif labels is not None:
        if labels.dtype == torch.bool:
            raise ValueError(
                "kd_loss: labels are torch.bool; expected class indices (int64), one per row, or "
                f"probabilities of the logits' shape {_shape(student)}"
            )
        if labels.shape != rows:
            raise ValueError(
                f"kd_loss: labels are {_shape(labels)}; expected {list(rows)}, one class index per "
                f"row of the logits {_shape(student)} with class_dim={class_dim}"
            )
        labels = labels if labels.dtype == torch.int64 else labels.long()
    weights = _per_row("weights", weights, rows)
    mask = _per_row("mask", mask, rows)
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"kd_loss: mask is {mask.dtype}; expected torch.bool")
    given = [("labels are", labels), ("weights are", weights), ("mask is", mask)]
    for name, x in (*(("teacher logits are", t) for t in teachers), *given):
        if x is not None and x.device != student.device:
            raise ValueError(
                f"kd_loss: {name} on {x.device} but student logits are on {student.device}; "
                "move them there"
            )
    if check:
        _check_values(student, teachers, labels, mask, ignore_index, class_dim)
    return Inputs(student, teachers, labels, weights, mask, float(temperature),
                  float(label_smoothing), ignore_index, class_dim)  # fmt: skip


def _per_row(name: str, x: Tensor | None, rows: torch.Size) -> Tensor | None:
    if x is None or x.shape == rows:
        return x
    if x.shape == rows[:1]:
        return x.reshape(-1, *[1] * (len(rows) - 1)).expand(rows)
    raise ValueError(
        f"kd_loss: {name} are {_shape(x)}; expected one per row {list(rows)} or per sample "
        f"{list(rows[:1])}"
    )


def _check_values(
    student: Tensor,
    teachers: list[Tensor],
    labels: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
    class_dim: int,
) -> None:
    for name, x in (("student", student), *(("teacher", t) for t in teachers)):
        sums = x.detach().float().sum(class_dim)
        if x.numel() and bool(((x >= 0).all() & ((sums - 1).abs() < 1e-2).all()).item()):
            raise ValueError(
                f"kd_loss: the {name}'s rows are positive and sum to 1: these are probabilities; "
                "expected raw logits (before softmax)"
            )
    if labels is not None and labels.is_floating_point():
        sums, least = labels.detach().float().sum(class_dim), labels.detach().amin(class_dim)
        # As wide as what rounding to bf16 leaves; a NaN is no probability either.
        wrong = ~((sums - 1).abs() < 1e-2) | ~(least >= 0)
        wrong = wrong if mask is None else wrong & mask
        if bool(wrong.any().item()):
            raise ValueError(
                f"kd_loss: labels are no probabilities: of a row the sum is {sums[wrong][0]:g} and "
                f"the least {least[wrong][0]:g}; expected each row to be positive with the sum 1"
            )
    elif labels is not None:
        classes = student.shape[class_dim]
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
        if bool(wrong.any().item()):
            raise ValueError(
                f"kd_loss: label {labels[wrong][0].item()} is no class: the logits have {classes} "
                f"classes (0 to {classes - 1}) and ignore_index is {ignore_index}"
            )


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
