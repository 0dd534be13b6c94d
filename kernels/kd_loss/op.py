"""`kd_loss` as torch sees it: schemas, shapes without data, gradients, and who implements what.

The ops have leading underscores and no autograd of their own: the three Functions below bring it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from fastkd.kernels._library import LIBRARY, attach
from fastkd.kernels.kd_loss.reference import kd_loss_reference
from torch import Tensor

__all__ = ["Mean", "MeanTraced", "Rows"]

_INPUTS = (
    "Tensor student, Tensor[] teachers, Tensor? labels, Tensor? weights, Tensor? mask, "
    "float temperature, float label_smoothing, int ignore_index, int class_dim"
)
_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(f"_kd_loss({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)", tags=_TAGS)
LIBRARY.define(
    f"_kd_loss_grad({_INPUTS}, Tensor? upstream_kd, Tensor? upstream_ce, Tensor? divisor, "
    "Tensor stats, float kd_scale, float ce_scale) -> Tensor",
    tags=_TAGS,
)
LIBRARY.define(
    f"_kd_loss_mean({_INPUTS}, float kd_weight, float ce_weight, bool with_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


class Rows(torch.autograd.Function):
    """Per-row losses; the backward pass computes the gradient from the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        labels: Tensor | None,
        weights: Tensor | None,
        mask: Tensor | None,
        temperature: float,
        label_smoothing: float,
        ignore_index: int,
        class_dim: int,
        triton: bool,
        *teachers: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The op; see the class."""
        ctx.numbers = (temperature, label_smoothing, ignore_index, class_dim)
        ctx.triton = triton
        ctx.set_materialize_grads(False)
        op = _ops("_kd_loss", triton)
        kd, ce, agree, stats = op(student, list(teachers), labels, weights, mask, *ctx.numbers)
        ctx.save_for_backward(student, labels, weights, mask, stats, *teachers)
        ctx.mark_non_differentiable(agree)
        return kd, ce, agree

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradient for the student, None for everything else."""
        student, labels, weights, mask, stats, *teachers = ctx.saved_tensors
        grad = None
        if _twice():
            inputs = (student, teachers, labels, weights, mask, *ctx.numbers)
            grad = _reference_gradient(inputs, upstream[0], upstream[1])
        elif upstream[0] is not None or upstream[1] is not None:
            op = _ops("_kd_loss_grad", ctx.triton)
            grad = op(student, teachers, labels, weights, mask, *ctx.numbers, upstream[0],
                      upstream[1], None, stats, 1.0, 1.0)  # fmt: skip
        return (grad, *[None] * (8 + len(teachers)))


class Mean(torch.autograd.Function):
    """The weighted mean. On the CPU its gradient is made in the forward pass and handed over once.

    That buffer belongs to the node alone. A backward pass with an incoming gradient of 1 gives it
    away, and a second one computes the gradient from the logits again, to the same bits; any other
    incoming gradient is applied out of place. Nothing that is kept is ever written to.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        labels: Tensor | None,
        weights: Tensor | None,
        mask: Tensor | None,
        temperature: float,
        label_smoothing: float,
        ignore_index: int,
        class_dim: int,
        kd_weight: float,
        ce_weight: float,
        triton: bool,
        *teachers: Tensor,
    ) -> Tensor:
        """The op; see the class."""
        ctx.numbers = (temperature, label_smoothing, ignore_index, class_dim)
        ctx.scales = (kd_weight, ce_weight)
        ctx.triton = triton
        # fp16 gradients come with a loss scale: a gradient stored without it would underflow.
        early = ctx.needs_input_grad[0] and _grad_in_forward(student, triton)
        op = _ops("_kd_loss_mean", triton)
        loss, divisor, grad, stats = op(
            student, list(teachers), labels, weights, mask, *ctx.numbers, *ctx.scales, early
        )
        ctx.save_for_backward(student, labels, weights, mask, divisor, stats, *teachers)
        ctx.grad = grad if early else None
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient for the student, None for everything else."""
        student, labels, weights, mask, divisor, stats, *teachers = ctx.saved_tensors
        grad = None
        if _twice():
            inputs = (student, teachers, labels, weights, mask, *ctx.numbers)
            kd_weight, ce_weight = (upstream * scale / divisor for scale in ctx.scales)
            grad = _reference_gradient(inputs, kd_weight, ce_weight)
        elif ctx.grad is not None:
            # Reading the scale costs nothing here: gradients are made early on the CPU only.
            scale = upstream.item()
            if scale == 1.0:
                grad, ctx.grad = ctx.grad, None
            elif ctx.grad.dtype in _EXACT:
                grad = ctx.grad * scale
        if grad is None:
            op = _ops("_kd_loss_grad", ctx.triton)
            grad = op(student, teachers, labels, weights, mask, *ctx.numbers, upstream, upstream,
                      divisor, stats, *ctx.scales)  # fmt: skip
        return (grad, *[None] * (10 + len(teachers)))


class MeanTraced(torch.autograd.Function):
    """`Mean` as torch.compile sees it: no state outside the saved tensors, no look at a value."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        labels: Tensor | None,
        weights: Tensor | None,
        mask: Tensor | None,
        temperature: float,
        label_smoothing: float,
        ignore_index: int,
        class_dim: int,
        kd_weight: float,
        ce_weight: float,
        triton: bool,
        *teachers: Tensor,
    ) -> Tensor:
        """The op; see the class."""
        ctx.numbers = (temperature, label_smoothing, ignore_index, class_dim)
        ctx.scales = (kd_weight, ce_weight)
        ctx.triton = triton
        ctx.early = (
            student.requires_grad and _grad_in_forward(student, triton) and student.dtype in _EXACT
        )
        op = _ops("_kd_loss_mean", triton)
        loss, divisor, grad, stats = op(
            student, list(teachers), labels, weights, mask, *ctx.numbers, *ctx.scales, ctx.early
        )
        if ctx.early:
            ctx.save_for_backward(grad)
        else:
            ctx.save_for_backward(student, labels, weights, mask, divisor, stats, *teachers)
        ctx.num_teachers = len(teachers)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient for the student, None for everything else."""
        if ctx.early:
            (made,) = ctx.saved_tensors
            grad = made * upstream.to(made.dtype)
        else:
            student, labels, weights, mask, divisor, stats, *teachers = ctx.saved_tensors
            op = _ops("_kd_loss_grad", ctx.triton)
            grad = op(student, teachers, labels, weights, mask, *ctx.numbers, upstream, upstream,
                      divisor, stats, *ctx.scales)  # fmt: skip
        return (grad, *[None] * (10 + ctx.num_teachers))


def _twice() -> bool:
    """Whether this backward pass is itself being recorded (create_graph=True)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _reference_gradient(
    inputs: tuple[Any, ...], upstream_kd: Tensor | None, upstream_ce: Tensor | None
) -> Tensor:
    """The gradient as a differentiable function of student and incoming gradients."""
    kd, ce, _ = kd_loss_reference(*inputs)
    total = kd.new_zeros(())
    if upstream_kd is not None:
        total = total + (upstream_kd * kd).sum()
    if upstream_ce is not None:
        total = total + (upstream_ce * ce).sum()
    return torch.autograd.grad(total, inputs[0], create_graph=True)[0]


# Dtypes in which the gradient may be stored before its scale is known.
_EXACT = (torch.float32, torch.float64)


def _grad_in_forward(student: Tensor, triton: bool) -> bool:
    return student.device.type == "cpu" and student.dtype != torch.float16 and not triton


def _ops(name: str, triton: bool) -> Any:
    """The op, or on CPU tensors with impl="triton" the kernel launcher itself (the interpreter)."""
    if triton:
        from fastkd.kernels.kd_loss import gpu

        return {"_kd_loss": gpu.rows, "_kd_loss_grad": gpu.grad, "_kd_loss_mean": gpu.mean}[name]
    return getattr(torch.ops.fastkd, name).default


def _row_shape(student: Tensor, class_dim: int) -> list[Any]:
    shape = list(student.shape)
    del shape[class_dim]
    return shape


def _wide(student: Tensor, teachers: Sequence[Tensor]) -> torch.dtype:
    double = any(x.dtype == torch.float64 for x in (student, *teachers))
    return torch.float64 if double else torch.float32


def _stats_fake(student: Tensor, teachers: Sequence[Tensor], class_dim: int) -> Tensor:
    """Per-row statistics for the backward pass: Triton keeps them, C++ reads the rows again."""
    rows = student.numel() // student.shape[class_dim] if student.device.type == "cuda" else 0
    return student.new_empty((4 + 2 * len(teachers)) * rows, dtype=torch.float32)


@torch.library.register_fake("fastkd::_kd_loss", lib=LIBRARY)
def _rows_fake(student, teachers, labels, weights, mask, *numbers):
    shape = _row_shape(student, numbers[-1])
    parts = [student.new_empty(shape, dtype=_wide(student, teachers)) for _ in range(3)]
    return *parts, _stats_fake(student, teachers, numbers[-1])


@torch.library.register_fake("fastkd::_kd_loss_grad", lib=LIBRARY)
def _grad_fake(student, teachers, labels, weights, mask, *numbers):
    return torch.empty_like(student)


@torch.library.register_fake("fastkd::_kd_loss_mean", lib=LIBRARY)
def _mean_fake(student, teachers, labels, weights, mask, *numbers):
    loss, divisor = (student.new_empty((), dtype=_wide(student, teachers)) for _ in range(2))
    grad = torch.empty_like(student) if numbers[-1] else student.new_empty(0)
    return loss, divisor, grad, _stats_fake(student, teachers, numbers[3])


attach("kd_loss", "kd_loss", {"rows": "_kd_loss", "grad": "_kd_loss_grad", "mean": "_kd_loss_mean"})
