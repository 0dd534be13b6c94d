"""How hard a sample is, from its logits, and the choice of the hardest of a pool.

`hardness` scores, `select_hardest` chooses: one launch each, and no gradient flows through either.
Formulas and error budget: README.md of this folder. `reference.py` says the same in plain torch;
`cpu.cpp` (through cpu.py) and `gpu.py` (Triton) are what runs.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastkd.kernels._library import Impl
from fastkd.kernels.hardness.inputs import Criterion, number_to_select, prepare, rows_to_gather
from fastkd.kernels.hardness.op import implementation

__all__ = ["Criterion", "Hardest", "hardness", "select_hardest"]


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
            mixed, any strides. Only what the criterion needs is required and read.
        labels: class indices [N] or [...]. One out of range (an ignore index) scores NaN.
        criterion: see above.
        temperature: T of "kl", above 0; use the loss's.
        impl: None picks by device; "reference", "cpp", "triton" force one.

    Returns:
        Scores [N] or [...], fp32 (fp64 if an input is), without gradient. "kl" and the entropies
        are never negative, and "kl" is exactly 0 for equal logits.

    Raises:
        ValueError: a missing input, shapes, dtypes or devices that do not fit, T <= 0, unknown
            criterion.
    """
    inputs = prepare(student, teacher, labels, criterion, temperature)
    logits, teacher, labels, kind, temperature = inputs
    tensors = [x for x in (logits, teacher, labels) if x is not None]
    score = implementation("hardness", tensors, impl)
    rows = logits.shape[:-1]
    if len(rows) == 1:
        return score(*inputs)
    flat = logits.flatten(0, -2)
    teacher = None if teacher is None else teacher.flatten(0, -2)
    labels = None if labels is None else labels.flatten()
    return score(flat, teacher, labels, kind, temperature).view(rows)


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
        ValueError: scores that are not a floating point vector, k and ratio both or neither given
            or out of range, a tensor of `gather` with a different number of rows.
    """
    number = number_to_select(scores, k, ratio)
    tensors = rows_to_gather(gather, scores.shape[0])
    index, num_nan = implementation("select_hardest", [scores], impl)(scores, number)
    return Hardest(index, num_nan, tuple(x[index] for x in tensors))
