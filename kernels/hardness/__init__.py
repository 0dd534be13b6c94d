"""How hard a sample is, from its logits, and the choice of the hardest of a pool.

`hardness` scores, `select_hardest` chooses: one launch each, and no gradient flows through either.
Formulas and error budget: README.md of this folder. `reference.py` says the same in plain torch,
`cpu.cpp` (through cpu.py) and `gpu.py` (Triton) are what runs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from fastkd.kernels._library import (
    LIBRARY,
    Core,
    Impl,
    choose_for,
    core,
    deferred,
    is_plain_cpu,
    register,
    triton_reason,
)
from fastkd.kernels.hardness import cpu
from fastkd.kernels.hardness.reference import hardness_reference, select_hardest_reference
from torch import Tensor

__all__ = ["Criterion", "Hardest", "hardness", "select_hardest"]

Criterion = Literal["kl", "teacher_entropy", "student_entropy", "cross_entropy", "margin"]


class Hardest(NamedTuple):
    """What `select_hardest` returns."""

    index: Tensor
    """int64 [K]: rows of the pool, hardest first."""
    num_nan: Tensor
    """int64, no dimensions: how many scores of the pool are NaN."""
    gathered: tuple[Tensor, ...]
    """Those rows of each tensor of `gather`, in the order of `index`."""


def hardness(
    student: Tensor | None = None,
    teacher: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    criterion: Criterion = "kl",
    temperature: float = 4.0,
    impl: Impl | None = None,
) -> Tensor:
    """Score of each sample, higher is harder, from raw logits in one pass; natural logarithms.

    "kl": KL(softmax(teacher / T) || softmax(student / T)), without T^2.
    "teacher_entropy", "student_entropy": entropy of the softmax at temperature 1.
    "cross_entropy": -log softmax(student)_y. "margin": max_{c != y} student_c - student_y.

    The first three are the data picking of KD + TLCutMix ("Understanding the Success of Knowledge
    Distillation: A Data Augmentation Perspective", section 3.2 and table 2). A class of
    probability 0 adds nothing; a NaN in a row makes its score NaN.

    Args:
        student, teacher: raw logits [N, C] or [..., C], C >= 2; fp32, bf16, fp16 or fp64, also
            mixed, any strides. Only what the criterion needs is asked for and read.
        labels: class indices [N] or [...]. One that is no class (an ignore index) scores NaN.
        criterion: see above.
        temperature: T of "kl", above 0; use that of the loss.
        impl: None picks by device; "reference", "cpp", "triton" force one.

    Returns:
        Scores [N] or [...], fp32 (fp64 if an input is), without gradient. "kl" and the entropies
        are never negative, and "kl" is exactly 0 for equal logits.

    Raises:
        ValueError: a missing input, shapes, dtypes or devices that do not fit, T <= 0, unknown
            criterion.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"hardness: got temperature={temperature}; expected a finite number above 0"
        )
    kind, logits, teacher, labels = _inputs(student, teacher, labels, criterion)
    tensors = [x for x in (logits, teacher, labels) if x is not None]
    score = _implementation("hardness", tensors, impl)
    rows = logits.shape[:-1]
    if len(rows) > 1:
        logits = logits.flatten(0, -2)
        teacher = None if teacher is None else teacher.flatten(0, -2)
        labels = None if labels is None else labels.flatten()
        return score(logits, teacher, labels, kind, float(temperature)).view(rows)
    return score(logits, teacher, labels, kind, float(temperature))


def select_hardest(
    scores: Tensor,
    k: int | None = None,
    *,
    ratio: float | None = None,
    gather: Tensor | Sequence[Tensor] = (),
    impl: Impl | None = None,
) -> Hardest:
    """The k samples with the highest scores, in descending order, ties to the lower index.

    NaN scores come last, after minus infinity: they are chosen only where k leaves no choice, and
    `num_nan` lets a guard decide. Output shapes depend on shapes alone and nothing waits for the
    device, so a CUDA graph can hold it.

    `select_hardest(hardness(student, teacher), k)` takes two launches from logits to indices, for
    pools of up to 4,096 samples.

    Args:
        scores: [N], any floating point dtype.
        k: how many, at least 1; all N, in order, if the pool is smaller.
        ratio: instead of k, the share of the pool, in (0, 1]: ceil(ratio * N).
        gather: tensors with N rows (images, logits, labels); their chosen rows are returned too,
            and carry gradients.
        impl: None picks by device; "reference", "cpp", "triton" force one.

    Raises:
        ValueError: scores that are no floating point vector, k and ratio both or neither given or
            out of range, a tensor of `gather` with another number of rows.
    """
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
    tensors = (gather,) if isinstance(gather, Tensor) else tuple(gather)
    for x in tensors:
        if x.dim() == 0 or x.shape[0] != size:
            raise ValueError(
                f"select_hardest: got a tensor {list(x.shape)} to gather from; expected {size} "
                "rows, as many as there are scores"
            )
    select = _implementation("select_hardest", [scores], impl)
    index, num_nan = select(scores, min(k, size))
    return Hardest(index, num_nan, tuple(x[index] for x in tensors))


# name: (what the op calls it, the inputs it reads)
_CRITERIA = {
    "kl": ("kl", ("student", "teacher")),
    "teacher_entropy": ("entropy", ("teacher",)),
    "student_entropy": ("entropy", ("student",)),
    "cross_entropy": ("cross_entropy", ("student", "labels")),
    "margin": ("margin", ("student", "labels")),
}


def _inputs(
    student: Tensor | None, teacher: Tensor | None, labels: Tensor | None, criterion: str
) -> tuple[str, Tensor, Tensor | None, Tensor | None]:
    """The op's criterion and its (logits, teacher's logits or None, labels or None), checked."""
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
    if logits.dim() < 2 or logits.shape[-1] < 2 or not logits.is_floating_point():
        raise ValueError(
            f"hardness: got {needs[0]} logits {list(logits.shape)} of {logits.dtype}; expected "
            "floating point [N, C] or [..., C] with at least 2 classes, which come last"
        )
    for name in needs[1:]:
        if (other := given[name]) is not None and other.device != logits.device:
            what = "labels" if name == "labels" else f"{name} logits"
            raise ValueError(
                f"hardness: {what} are on {other.device} but {needs[0]} logits are on "
                f"{logits.device}; move them there"
            )
    if kind == "entropy":
        return kind, logits, None, None
    if kind == "kl":
        assert teacher is not None
        if teacher.shape != logits.shape or not teacher.is_floating_point():
            raise ValueError(
                f"hardness: student logits are {list(logits.shape)} but teacher logits are "
                f"{list(teacher.shape)} of {teacher.dtype}; both must be floating point and have "
                "one shape. Do the models share a class list?"
            )
        return kind, logits, teacher, None
    assert labels is not None
    if labels.shape != logits.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"hardness: got labels {list(labels.shape)} of {labels.dtype}; expected one class "
            f"index per row of the logits {list(logits.shape)}"
        )
    return kind, logits, None, labels if labels.dtype == torch.int64 else labels.long()


_REFERENCES = {"hardness": hardness_reference, "select_hardest": select_hardest_reference}


def _implementation(op: str, tensors: Sequence[Tensor], impl: Impl | None) -> Callable[..., Any]:
    picked = choose_for(op, tensors, impl)
    if picked == "reference":
        return _REFERENCES[op]
    if picked == "cpp" and is_plain_cpu(tensors):
        return getattr(cpu, op)
    if impl == "triton":
        # The launcher itself: CPU tensors reach it under Triton's interpreter.
        from fastkd.kernels.hardness import gpu

        return getattr(gpu, op)
    return getattr(torch.ops.fastkd, f"_{op}").default


_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    "_hardness(Tensor logits, Tensor? teacher, Tensor? labels, str criterion, float temperature) "
    "-> Tensor",
    tags=_TAGS,
)
LIBRARY.define("_select_hardest(Tensor scores, SymInt k) -> (Tensor, Tensor)", tags=_TAGS)


@torch.library.register_fake("fastkd::_hardness", lib=LIBRARY)
def _hardness_fake(logits, teacher, labels, criterion, temperature):
    double = any(x is not None and x.dtype == torch.float64 for x in (logits, teacher))
    return logits.new_empty(logits.shape[0], dtype=torch.float64 if double else torch.float32)


@torch.library.register_fake("fastkd::_select_hardest", lib=LIBRARY)
def _select_hardest_fake(scores, k):
    return scores.new_empty(k, dtype=torch.int64), scores.new_empty((), dtype=torch.int64)


def _register() -> None:
    for op in ("hardness", "select_hardest"):
        backends: dict[str, Impl] = {}
        # Nothing is recorded for a backward pass: the results carry no gradient.
        LIBRARY.impl(f"_{op}", torch.library.fallthrough_kernel, "Autograd")
        if isinstance(core(), Core):
            LIBRARY.impl(f"_{op}", getattr(cpu, op), "CPU")
            backends["cpu"] = "cpp"
        if triton_reason() is None:
            LIBRARY.impl(f"_{op}", deferred("fastkd.kernels.hardness.gpu", op), "CUDA")
            backends["cuda"] = "triton"
        register(op, backends)


_register()
