"""What `hardness` and `select_hardest` accept: checks that look at no value."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["KINDS", "Criterion", "Inputs", "number_to_select", "prepare", "rows_to_gather"]

Criterion = Literal["kl", "teacher_entropy", "student_entropy", "cross_entropy", "margin"]
# The op's criteria. The kernels know a kind by its place here.
KINDS = ("kl", "entropy", "cross_entropy", "margin")
# A criterion's kind and the inputs it reads; the first are the op's logits.
_CRITERIA: dict[Criterion, tuple[str, tuple[str, ...]]] = {
    "kl": ("kl", ("student", "teacher")),
    "teacher_entropy": ("entropy", ("teacher",)),
    "student_entropy": ("entropy", ("student",)),
    "cross_entropy": ("cross_entropy", ("student", "labels")),
    "margin": ("margin", ("student", "labels")),
}


class Inputs(NamedTuple):
    """The arguments of the op `_hardness`, in their order."""

    logits: Tensor
    """[N, C] or [..., C]: the student's, or the one tensor that the kind reads."""
    teacher: Tensor | None
    """Of the logits' shape; for "kl" only."""
    labels: Tensor | None
    """int64, one per row; for "cross_entropy" and "margin" only."""
    kind: str
    temperature: float


def prepare(
    student: Tensor | None,
    teacher: Tensor | None,
    labels: Tensor | None,
    criterion: Criterion,
    temperature: float,
) -> Inputs:
    """Pick and check what the criterion reads."""
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"hardness: got temperature={temperature}; expected a finite number above 0"
        )
    if criterion not in _CRITERIA:
        expected = ", ".join(_CRITERIA)
        raise ValueError(f"hardness: got criterion={criterion!r}; expected one of {expected}")
    given = {"student": student, "teacher": teacher, "labels": labels}
    kind, needs = _CRITERIA[criterion]
    for name in needs:
        if given[name] is None:
            raise ValueError(
                f"hardness: criterion {criterion!r} needs {' and '.join(needs)}; got no {name}"
            )
    logits = given[needs[0]]
    assert logits is not None
    _check_logits(needs[0], logits)
    for name in needs[1:]:
        if (other := given[name]) is not None and other.device != logits.device:
            what = "labels" if name == "labels" else f"{name} logits"
            raise ValueError(
                f"hardness: {what} are on {other.device} but {needs[0]} logits are on "
                f"{logits.device}; move them there"
            )
    teacher = _checked_teacher(teacher, logits) if "teacher" in needs[1:] else None
    labels = _checked_labels(labels, logits) if "labels" in needs else None
    return Inputs(logits, teacher, labels, kind, float(temperature))


def _check_logits(name: str, logits: Tensor) -> None:
    if logits.dim() < 2 or logits.shape[-1] < 2 or not logits.is_floating_point():
        raise ValueError(
            f"hardness: got {name} logits {list(logits.shape)} of {logits.dtype}; expected "
            "floating point [N, C] or [..., C] with at least 2 classes, which come last"
        )


def _checked_teacher(teacher: Tensor | None, logits: Tensor) -> Tensor:
    assert teacher is not None
    if teacher.shape != logits.shape or not teacher.is_floating_point():
        raise ValueError(
            f"hardness: student logits are {list(logits.shape)} but teacher logits are "
            f"{list(teacher.shape)} of {teacher.dtype}; both must be floating point and have one "
            "shape. Do the models share a class list?"
        )
    return teacher


def _checked_labels(labels: Tensor | None, logits: Tensor) -> Tensor:
    assert labels is not None
    if labels.shape != logits.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"hardness: got labels {list(labels.shape)} of {labels.dtype}; expected one class "
            f"index per row of the logits {list(logits.shape)}"
        )
    return labels if labels.dtype == torch.int64 else labels.long()


def number_to_select(scores: Tensor, k: int | None, ratio: float | None) -> int:
    """How many of the scores [N] `select_hardest` returns, from its arguments."""
    if scores.dim() != 1 or not scores.is_floating_point():
        raise ValueError(
            f"select_hardest: got scores {list(scores.shape)} of {scores.dtype}; expected a "
            "floating point vector [N]. Flatten them, or score with fastkd.kernels.hardness"
        )
    size = scores.shape[0]
    if k is not None and ratio is None:
        if k < 1:
            raise ValueError(f"select_hardest: got k={k}; expected at least 1")
    elif ratio is not None and k is None:
        if not 0 < ratio <= 1:
            raise ValueError(f"select_hardest: got ratio={ratio}; expected above 0, at most 1")
        # 0.1 * 30 is a little more than 3 and means 3.
        k = math.ceil(ratio * size - 1e-9)
    else:
        raise ValueError(
            f"select_hardest: got k={k} and ratio={ratio}; expected exactly one of them"
        )
    return min(k, size)


def rows_to_gather(gather: Tensor | Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
    """The tensors of `gather`, each with as many rows as there are scores."""
    tensors = (gather,) if isinstance(gather, Tensor) else tuple(gather)
    for x in tensors:
        if x.dim() == 0 or x.shape[0] != size:
            raise ValueError(
                f"select_hardest: got a tensor {list(x.shape)} to gather from; expected {size} "
                "rows, as many as there are scores"
            )
    return tensors
