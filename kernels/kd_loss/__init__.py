"""Fused distillation loss from raw logits: per-row T^2 * KL(teacher || student) and cross entropy.

Formula and error budget: README.md of this folder. `reference.py` says the same in plain torch;
`cpu.cpp` (through cpu.py) and `gpu.py` (Triton) are what runs.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastkd.kernels._library import Impl, choose_for
from fastkd.kernels.kd_loss.inputs import Inputs, check_values, prepare, rows_that_count
from fastkd.kernels.kd_loss.op import Mean, Rows, flatten
from fastkd.kernels.kd_loss.reference import kd_loss_reference

__all__ = ["KDRows", "kd_loss", "kd_loss_mean", "rows_that_count"]


class KDRows(NamedTuple):
    """Per-row results of `kd_loss`, each of the logits' shape without the class dimension."""

    kd: Tensor
    """T^2 * KL(teacher || student) at temperature T, nats."""
    ce: Tensor
    """Cross entropy at temperature 1, nats."""
    agree: Tensor
    """1 where student and teacher have the same most probable class (ties: the lower), else 0."""


def kd_loss(
    student: Tensor,
    teacher: Tensor | Sequence[Tensor] | None = None,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_dim: int = -1,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    impl: Impl | None = None,
    check: bool = False,
) -> KDRows:
    """Per-row distillation loss and cross entropy from raw logits, fused forward and backward.

    kd = T^2 * KL(softmax(teacher / T) || softmax(student / T)), ce = cross entropy of
    softmax(student) against the labels, both summed over classes, in nats (Hinton et al. 2015,
    arXiv:1503.02531). The T^2 keeps the gradient's size independent of T.

    Args:
        student: raw logits (not probabilities) [N, C] or [..., C], or [N, C, ...] with class_dim=1;
            fp32, bf16, fp16 or fp64, any strides. Channels-last dense logits are read in place.
        teacher: raw logits of the same shape, any of these dtypes; a list of up to 4 is averaged in
            probability; None: kd is 0. No gradient flows to it.
        labels: class indices (int64) of the logits' shape without the class dimension, or target
            probabilities of the logits' shape (no gradient flows to them), or None: ce is 0.
        temperature: T, above 0. The cross entropy is always taken at temperature 1.
        label_smoothing: share of the target spread over all classes, 0 to 1.
        ignore_index: rows with this label give 0 in every part and no gradient.
        class_dim: -1, or 1 for [N, C, ...].
        weights: per row (or per sample [N]), multiplies kd and ce of the row.
        mask: bool, per row (or per sample [N]); False drops the row as ignore_index does.
        impl: None picks by device; "reference", "cpp", "triton" force one.
        check: also look at the values (labels in range or probabilities, logits that are not
            probabilities); this waits for the device.

    Returns:
        KDRows of fp32 tensors (fp64 if an input is), computed in that precision from the inputs as
        they are. kd is never negative; with one teacher, kd and its gradient are exactly 0 for
        equal logits. Gradients flow from kd and ce to the student, in the student's dtype. Where
        the student rules a class out (a logit of -inf) that the teacher does not, kd is infinite
        and its gradient is not: the gradient is right, kd is inf, NaN or about 1e30, by `impl`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, fewer than 2 classes, T <= 0, more
            than 4 teachers, swapped arguments, and on the CPU a label out of range.
    """
    inputs = prepare(
        student,
        teacher,
        labels,
        temperature=temperature,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        class_dim=class_dim,
        weights=weights,
        mask=mask,
    )
    if check:
        check_values(inputs)
    if _impl(inputs, impl) == "reference":
        return KDRows(*kd_loss_reference(inputs))
    return KDRows(*Rows.apply(impl == "triton", *flatten(inputs)))


def kd_loss_mean(
    student: Tensor,
    teacher: Tensor | Sequence[Tensor] | None = None,
    labels: Tensor | None = None,
    *,
    kd_weight: float = 0.9,
    ce_weight: float = 0.1,
    temperature: float = 4.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_dim: int = -1,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    impl: Impl | None = None,
    check: bool = False,
) -> Tensor:
    """`(kd_weight * kd + ce_weight * ce)` of `kd_loss`, summed over rows, / rows that count.

    A row counts unless it has the ignore index or mask is False; per-sample weights do not change
    the divisor; where no row counts the loss is 0. One pass over the logits: loss and gradient come
    out together where that measures faster, else the backward pass computes the gradient.

    Returns a scalar, fp32 (fp64 if an input is). Other arguments and errors: see `kd_loss`.
    """
    inputs = prepare(
        student,
        teacher,
        labels,
        temperature=temperature,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        class_dim=class_dim,
        weights=weights,
        mask=mask,
    )
    if check:
        check_values(inputs)
    if _impl(inputs, impl) == "reference":
        kd, ce, _ = kd_loss_reference(inputs)
        counts = rows_that_count(kd, inputs.labels, inputs.mask, ignore_index)
        return (kd_weight * kd + ce_weight * ce).sum() / counts.sum().clamp_min(1)
    return Mean.apply(kd_weight, ce_weight, impl == "triton", *flatten(inputs))


def _impl(inputs: Inputs, impl: Impl | None) -> Impl:
    return choose_for("kd_loss", [inputs.student, *inputs.teachers], impl)
