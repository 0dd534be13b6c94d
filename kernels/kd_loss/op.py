"""`kd_loss` as torch sees it: schemas, shapes without data, gradients, and what implements them.

The ops have leading underscores and no autograd of their own: the two Functions below bring it.
Elsewhere in this folder `Inputs` is passed on as one value. Torch needs flat arguments: an op one
per field, an autograd Function also one per teacher.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fastkd.kernels._autograd import is_left_to_torch, reference_gradients
from fastkd.kernels._library import LIBRARY, attach, is_plain_cpu
from fastkd.kernels.kd_loss import cpu
from fastkd.kernels.kd_loss.inputs import Inputs
from fastkd.kernels.kd_loss.reference import kd_loss_reference

__all__ = ["Mean", "Rows", "flatten", "takes_fields", "unflatten"]

_NUM_FIELDS = len(Inputs._fields)
_TYPES = {
    Tensor: "Tensor",
    list[Tensor]: "Tensor[]",
    Tensor | None: "Tensor?",
    float: "float",
    int: "int",
}
_FIELDS = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in Inputs.__annotations__.items())
_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(f"_kd_loss({_FIELDS}) -> (Tensor, Tensor, Tensor, Tensor)", tags=_TAGS)
LIBRARY.define(
    f"_kd_loss_grad({_FIELDS}, Tensor? upstream_kd, Tensor? upstream_ce, Tensor? divisor, "
    "Tensor stats, float kd_scale, float ce_scale) -> Tensor",
    tags=_TAGS,
)
LIBRARY.define(
    f"_kd_loss_mean({_FIELDS}, float kd_weight, float ce_weight, bool with_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
# A function of cpu.py and gpu.py: the op it implements.
_OPERATORS = {"rows": "_kd_loss", "grad": "_kd_loss_grad", "mean": "_kd_loss_mean"}
# Dtypes in which the gradient may be stored before its scale is known.
_EXACT = (torch.float32, torch.float64)


def flatten(inputs: Inputs) -> tuple[Any, ...]:
    """The inputs one by one, teachers too: autograd finds the student only in a flat list."""
    return (inputs.student, *inputs.teachers, *inputs[2:])


def unflatten(values: Sequence[Any]) -> Inputs:
    """The inverse of `flatten`."""
    after = len(values) - (_NUM_FIELDS - 2)
    return Inputs(values[0], list(values[1:after]), *values[after:])


def takes_fields(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(inputs, ..)` as an op calls it, with the fields of the inputs one by one."""

    def call(*arguments: Any) -> Any:
        return function(Inputs(*arguments[:_NUM_FIELDS]), *arguments[_NUM_FIELDS:])

    return call


def _run(name: str, triton: bool, inputs: Inputs, *rest: Any) -> Any:
    """Call the op, or the function behind it where the dispatcher has nothing to add.

    That is in plain eager mode on a CPU, where two crossings of the dispatcher take about as long
    as a small batch, and with impl="triton", where CPU tensors are for the interpreter.
    """
    if triton:
        from fastkd.kernels.kd_loss import gpu

        return getattr(gpu, name)(inputs, *rest)
    student, teachers, labels, *_, weights, mask = inputs
    values = (student, *teachers, labels, weights, mask, *rest)
    if is_plain_cpu([x for x in values if isinstance(x, Tensor)]):
        return getattr(cpu, name)(inputs, *rest)
    return getattr(torch.ops.fastkd, _OPERATORS[name]).default(*inputs, *rest)


class Rows(torch.autograd.Function):
    """Per-row losses; the backward pass computes the gradient from the logits again."""

    @staticmethod
    @override
    def forward(ctx: Any, triton: bool, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs = unflatten(values)
        ctx.triton = triton
        ctx.set_materialize_grads(False)
        kd, ce, agree, stats = _run("rows", triton, inputs)
        _save(ctx, inputs, stats)
        ctx.mark_non_differentiable(agree)
        return kd, ce, agree

    @staticmethod
    @override
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, (stats,) = _saved(ctx, ctx.saved_tensors)
        grad = None
        if is_left_to_torch(upstream[:2]):
            grad = _reference_gradient(inputs, upstream[0], upstream[1])
        elif upstream[0] is not None or upstream[1] is not None:
            rest = (upstream[0], upstream[1], None, stats, 1.0, 1.0)
            grad = _run("grad", ctx.triton, inputs, *rest)
        return (None, *_for_student(grad, len(inputs.teachers)))


class Mean(torch.autograd.Function):
    """The weighted mean. On the CPU its gradient may be made in the forward pass, see `_is_early`.

    Eager: that buffer belongs to the node alone. A backward pass with an incoming gradient of 1
    gives it away, and a second one computes the gradient from the logits again, to the same bits;
    any other incoming gradient is applied out of place. Nothing that is kept is ever written to.

    Compiled: a graph knows no state outside the saved tensors and looks at no value. The gradient
    is saved in place of the inputs, and every incoming gradient is applied out of place.
    """

    @staticmethod
    @override
    def forward(ctx: Any, kd_weight: float, ce_weight: float, triton: bool, *values: Any) -> Tensor:
        inputs = unflatten(values)
        ctx.triton, ctx.scales = triton, (kd_weight, ce_weight)
        ctx.num_teachers = len(inputs.teachers)
        early = inputs.student.requires_grad and _is_early(inputs.student, triton)
        loss, divisor, grad, stats = _run("mean", triton, inputs, *ctx.scales, early)
        ctx.saves_grad = early and torch.compiler.is_compiling()
        ctx.own_grad = None
        if ctx.saves_grad:
            ctx.save_for_backward(grad)
        else:
            _save(ctx, inputs, divisor, stats)
            if early:
                ctx.own_grad = grad
        return loss

    @staticmethod
    @override
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if ctx.saves_grad:
            grad = tensors[0] * upstream.to(tensors[0].dtype)
        elif is_left_to_torch([upstream]):
            inputs, (divisor, _) = _saved(ctx, tensors)
            up_kd, up_ce = (upstream * scale / divisor for scale in ctx.scales)
            grad = _reference_gradient(inputs, up_kd, up_ce)
        else:
            grad = _from_own_gradient(ctx, upstream)
            if grad is None:
                inputs, (divisor, stats) = _saved(ctx, tensors)
                rest = (upstream, upstream, divisor, stats, *ctx.scales)
                grad = _run("grad", ctx.triton, inputs, *rest)
        return (None, None, None, *_for_student(grad, ctx.num_teachers))


def _is_early(student: Tensor, triton: bool) -> bool:
    """Whether the mean's gradient is made in the forward pass, for an incoming gradient of 1."""
    if triton or student.device.type != "cpu":
        return False
    if torch.compiler.is_compiling():
        return student.dtype in _EXACT
    # fp16 gradients come with a loss scale: a gradient stored without it would underflow.
    return student.dtype != torch.float16


def _from_own_gradient(ctx: Any, upstream: Tensor) -> Tensor | None:
    """The gradient that the forward pass made, if it is still there and can be scaled."""
    if ctx.own_grad is None:
        return None
    # Reading the scale costs nothing here: gradients are made early on the CPU only.
    scale = upstream.item()
    if scale == 1.0:
        grad, ctx.own_grad = ctx.own_grad, None
        return grad
    return ctx.own_grad * scale if ctx.own_grad.dtype in _EXACT else None


def _save(ctx: Any, inputs: Inputs, *made: Tensor) -> None:
    """Keep the inputs, and what else the forward pass made."""
    ctx.numbers = inputs[3:7]
    ctx.num_made = len(made)
    ctx.save_for_backward(
        *made, inputs.student, inputs.labels, inputs.weights, inputs.mask, *inputs.teachers
    )


def _saved(ctx: Any, tensors: Sequence[Tensor]) -> tuple[Inputs, Sequence[Tensor]]:
    """The inputs and the rest that `_save` kept."""
    student, labels, weights, mask, *teachers = tensors[ctx.num_made :]
    numbers: tuple[float, float, int, int] = ctx.numbers
    inputs = Inputs(student, teachers, labels, *numbers, weights, mask)
    return inputs, tensors[: ctx.num_made]


def _for_student(grad: Tensor | None, num_teachers: int) -> tuple[Tensor | None, ...]:
    """Gradients of `flatten(inputs)`: one for the student, None for everything else."""
    return (grad, *[None] * (num_teachers + _NUM_FIELDS - 2))


def _reference_gradient(
    inputs: Inputs, upstream_kd: Tensor | None, upstream_ce: Tensor | None
) -> Tensor | None:
    """The gradient at the student as a differentiable function of it and incoming gradients."""
    if upstream_kd is None and upstream_ce is None:
        return None
    upstream = (upstream_kd, upstream_ce)
    return reference_gradients(lambda: kd_loss_reference(inputs)[:2], [inputs.student], upstream)[0]


def _empty_row_values(inputs: Inputs) -> Tensor:
    shape = list(inputs.student.shape)
    del shape[inputs.class_dim]
    return inputs.student.new_empty(shape, dtype=_working_dtype(inputs))


def _working_dtype(inputs: Inputs) -> torch.dtype:
    double = any(x.dtype == torch.float64 for x in (inputs.student, *inputs.teachers))
    return torch.float64 if double else torch.float32


def _empty_stats(inputs: Inputs) -> Tensor:
    """Per-row statistics for the backward pass: Triton keeps them, C++ reads the rows again."""
    student, num_teachers = inputs.student, len(inputs.teachers)
    on_gpu = student.device.type == "cuda"
    rows = student.numel() // student.shape[inputs.class_dim] if on_gpu else 0
    return student.new_empty((4 + 2 * num_teachers) * rows, dtype=torch.float32)


@torch.library.register_fake("fastkd::_kd_loss", lib=LIBRARY)
@takes_fields
def _rows_fake(inputs):
    kd, ce, agree = (_empty_row_values(inputs) for _ in range(3))
    return kd, ce, agree, _empty_stats(inputs)


@torch.library.register_fake("fastkd::_kd_loss_grad", lib=LIBRARY)
@takes_fields
def _grad_fake(inputs, *_):
    return torch.empty_like(inputs.student)


@torch.library.register_fake("fastkd::_kd_loss_mean", lib=LIBRARY)
@takes_fields
def _mean_fake(inputs, kd_weight, ce_weight, with_grad):
    student, wide = inputs.student, _working_dtype(inputs)
    loss, divisor = (student.new_empty((), dtype=wide) for _ in range(2))
    grad = torch.empty_like(student) if with_grad else student.new_empty(0)
    return loss, divisor, grad, _empty_stats(inputs)


attach("kd_loss", "kd_loss", _OPERATORS, adapt=takes_fields)
