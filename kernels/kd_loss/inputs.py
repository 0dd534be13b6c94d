"""What `kd_loss` accepts: checks that need no look at a value and, on request, those that do."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MAX_TEACHERS", "Inputs", "check_values", "prepare", "rows_that_count"]

# Also in C++: kMaxTeachers in args.h.
MAX_TEACHERS = 4


class Inputs(NamedTuple):
    """What a loss is computed from, in the order used from the public functions to C++."""

    student: Tensor
    """Raw logits, classes in `class_dim`."""
    teachers: list[Tensor]
    """Up to MAX_TEACHERS, each of the student's shape."""
    labels: Tensor | None
    """int64 class indices, one per row, or probabilities of the student's shape."""
    temperature: float
    label_smoothing: float
    ignore_index: int
    class_dim: int
    """-1 or 1."""
    weights: Tensor | None
    """One per row."""
    mask: Tensor | None
    """Bool, one per row."""


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
    *,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    class_dim: int,
    weights: Tensor | None,
    mask: Tensor | None,
) -> Inputs:
    """Check all that can be checked without waiting for a device; bring the inputs to one form."""
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher or ())
    class_dim = _checked_class_dim(student, class_dim)
    _check_logits(student, teachers)
    _check_numbers(temperature, label_smoothing)
    shape = student.shape
    rows = shape[:-1] if class_dim == -1 else shape[:1] + shape[2:]
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"kd_loss: mask is {mask.dtype}; expected torch.bool")
    inputs = Inputs(
        student,
        teachers,
        _checked_labels(student, labels, rows, class_dim),
        float(temperature),
        float(label_smoothing),
        ignore_index,
        class_dim,
        _per_row("weights", weights, rows),
        _per_row("mask", mask, rows),
    )
    _check_devices(inputs)
    return inputs


def _checked_class_dim(student: Tensor, class_dim: int) -> int:
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
    return class_dim


def _check_logits(student: Tensor, teachers: list[Tensor]) -> None:
    if len(teachers) > MAX_TEACHERS:
        raise ValueError(
            f"kd_loss: got {len(teachers)} teachers; expected at most {MAX_TEACHERS}. "
            "Average the rest in probability yourself and pass log-probabilities as one teacher"
        )
    if not student.is_floating_point():
        raise ValueError(f"kd_loss: student logits are {student.dtype}; expected floating point")
    for t in teachers:
        if not t.is_floating_point():
            raise ValueError(f"kd_loss: teacher logits are {t.dtype}; expected floating point")
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


def _check_numbers(temperature: float, label_smoothing: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"kd_loss: got temperature={temperature}; expected a finite number above 0"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"kd_loss: got label_smoothing={label_smoothing}; expected 0 to 1")


def _checked_labels(
    student: Tensor, labels: Tensor | None, rows: torch.Size, class_dim: int
) -> Tensor | None:
    if labels is None:
        return None
    if labels.is_floating_point():
        if labels.shape != student.shape:
            raise ValueError(
                f"kd_loss: labels are probabilities of shape {_shape(labels)}; expected the shape "
                f"of the logits, {_shape(student)} (or class indices as int64)"
            )
        return labels
    if labels.shape == student.shape:
        raise ValueError(
            f"kd_loss: labels are {labels.dtype} of the logits' shape {_shape(student)}; expected "
            "class indices, one per row, or floating-point probabilities: one-hot labels are "
            "labels.float()"
        )
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
    return labels if labels.dtype == torch.int64 else labels.long()


def _per_row(name: str, x: Tensor | None, rows: torch.Size) -> Tensor | None:
    if x is None or x.shape == rows:
        return x
    if x.shape == rows[:1]:
        return x.reshape(-1, *[1] * (len(rows) - 1)).expand(rows)
    raise ValueError(
        f"kd_loss: {name} are {_shape(x)}; expected one per row {list(rows)} or per sample "
        f"{list(rows[:1])}"
    )


def _check_devices(inputs: Inputs) -> None:
    for t in inputs.teachers:
        _check_device("teacher logits are", t, inputs.student)
    _check_device("labels are", inputs.labels, inputs.student)
    _check_device("weights are", inputs.weights, inputs.student)
    _check_device("mask is", inputs.mask, inputs.student)


def _check_device(name: str, x: Tensor | None, student: Tensor) -> None:
    if x is not None and x.device != student.device:
        raise ValueError(
            f"kd_loss: {name} on {x.device} but student logits are on {student.device}; "
            "move them there"
        )


def check_values(inputs: Inputs) -> None:
    """Raise ValueError for logits that are probabilities, or wrong labels; waits for the device."""
    teachers = (("teacher", t) for t in inputs.teachers)
    for name, x in (("student", inputs.student), *teachers):
        sums = x.detach().float().sum(inputs.class_dim)
        if x.numel() and bool(((x >= 0).all() & ((sums - 1).abs() < 1e-2).all()).item()):
            raise ValueError(
                f"kd_loss: the {name}'s rows are positive and sum to 1: these are probabilities; "
                "expected raw logits (before softmax)"
            )
    if inputs.labels is None:
        return
    if inputs.labels.is_floating_point():
        _check_soft_labels(inputs.labels, inputs.mask, inputs.class_dim)
    else:
        _check_hard_labels(inputs.labels, inputs.ignore_index, inputs.student, inputs.class_dim)


def _check_soft_labels(labels: Tensor, mask: Tensor | None, class_dim: int) -> None:
    sums, least = labels.detach().float().sum(class_dim), labels.detach().amin(class_dim)
    # Wide enough for values rounded to bf16; a NaN is wrong too.
    wrong = ~((sums - 1).abs() < 1e-2) | ~(least >= 0)
    wrong = wrong if mask is None else wrong & mask
    if bool(wrong.any().item()):
        raise ValueError(
            f"kd_loss: labels are not probabilities: a row sums to {sums[wrong][0]:g}, its least "
            f"value is {least[wrong][0]:g}; expected rows that are positive and sum to 1"
        )


def _check_hard_labels(labels: Tensor, ignore_index: int, student: Tensor, class_dim: int) -> None:
    classes = student.shape[class_dim]
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
    if bool(wrong.any().item()):
        raise ValueError(
            f"kd_loss: label {labels[wrong][0].item()} is out of range: the logits have {classes} "
            f"classes (0 to {classes - 1}) and ignore_index is {ignore_index}"
        )


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
