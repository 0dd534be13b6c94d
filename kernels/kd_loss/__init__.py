"""Fused distillation loss from raw logits: per-row T^2 * KL(teacher || student) and cross entropy.

Formula and error budget: README.md of this folder. `reference.py` says the same in plain torch,
`cpu.cpp` (through cpu.py) and `gpu.py` (Triton) are what runs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.kernels._library import LIBRARY, Core, Impl, choose, core, register
from fastkd.kernels.kd_loss.reference import kd_loss_reference

__all__ = ["KDRows", "kd_loss", "kd_loss_mean", "rows_that_count"]

MAX_TEACHERS = 4

_INPUTS = (
    "Tensor student, Tensor[] teachers, Tensor? labels, Tensor? weights, Tensor? mask, "
    "float temperature, float label_smoothing, int ignore_index, int class_dim"
)
_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(f"_kd_loss({_INPUTS}) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
LIBRARY.define(
    f"_kd_loss_grad({_INPUTS}, Tensor? upstream_kd, Tensor? upstream_ce, Tensor? divisor, "
    "float kd_scale, float ce_scale) -> Tensor",
    tags=_TAGS,
)
LIBRARY.define(
    f"_kd_loss_mean({_INPUTS}, float kd_weight, float ce_weight, bool with_grad) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


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
        check: also look at the values (labels in range, logits that are no probabilities); this
            waits for the device.

    Returns:
        KDRows of fp32 tensors (fp64 if an input is), computed in that precision from the inputs as
        they are. kd is never negative; with one teacher, kd and its gradient are exactly 0 for
        equal logits. Gradients flow from kd and ce to the student, in the student's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, fewer than 2 classes, T <= 0, more than 4
            teachers, swapped arguments, and on the CPU a label that is no class.
    """
    inputs = _prepare(student, teacher, labels, temperature, label_smoothing, ignore_index,
                      class_dim, weights, mask, check)  # fmt: skip
    if _backend(inputs, impl) == "reference":
        return KDRows(*kd_loss_reference(*inputs))
    student, teachers, *rest = inputs
    return KDRows(*_Rows.apply(student, *rest, impl == "triton", *teachers))


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
    out together where that measures faster, else the backward pass computes the gradient anew.

    Returns a scalar, fp32 (fp64 if an input is). Other arguments and errors: see `kd_loss`.
    """
    inputs = _prepare(student, teacher, labels, temperature, label_smoothing, ignore_index,
                      class_dim, weights, mask, check)  # fmt: skip
    if _backend(inputs, impl) == "reference":
        kd, ce, _ = kd_loss_reference(*inputs)
        counts = rows_that_count(kd, inputs[2], inputs[4], ignore_index)
        return (kd_weight * kd + ce_weight * ce).sum() / counts.sum().clamp_min(1)
    student, teachers, *rest = inputs
    function = _Mean
    if torch.compiler.is_compiling():
        function = _MeanTraced
    return function.apply(student, *rest, kd_weight, ce_weight, impl == "triton", *teachers)


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


def _prepare(
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
) -> tuple[Any, ...]:
    """Checks what can be checked without waiting for a device; the ops' common arguments."""
    teachers = [] if teacher is None else [teacher] if isinstance(teacher, Tensor) else list(teacher)
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
            f"kd_loss: got {classes} classes (dimension {class_dim} of {_shape(student)}); expected "
            "at least 2. Are the classes in another dimension (class_dim)?"
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
                f"kd_loss: student logits are {_shape(student)} but teacher logits are {_shape(t)}; "
                "both must have one shape. Do the models share a class list?"
            )
        if t.requires_grad and not student.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "kd_loss: the teacher's logits require grad and the student's do not; the order is "
                "kd_loss(student, teacher, labels). Swap them, or detach both"
            )
    if not temperature > 0:
        raise ValueError(f"kd_loss: got temperature={temperature}; expected a number above 0")
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
    if check:
        _check_values(student, teachers, labels, ignore_index, class_dim)
    return (student, teachers, labels, weights, mask, float(temperature), float(label_smoothing),
            ignore_index, class_dim)  # fmt: skip


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
    if labels is not None and not labels.is_floating_point():
        classes = student.shape[class_dim]
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
        if bool(wrong.any().item()):
            raise ValueError(
                f"kd_loss: label {labels[wrong][0].item()} is no class: the logits have {classes} "
                f"classes (0 to {classes - 1}) and ignore_index is {ignore_index}"
            )


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _backend(inputs: tuple[Any, ...], impl: Impl | None) -> Impl:
    student = inputs[0]
    picked = choose("kd_loss", student.device.type, impl)
    if picked == "triton" and any(x.dtype == torch.float64 for x in (student, *inputs[1])):
        if impl == "triton":
            raise ValueError("kd_loss: impl='triton' takes fp32, bf16 and fp16, not fp64")
        return "reference"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        # vmap, torch.func.grad and jvp pass through plain torch code only.
        if impl not in (None, "reference"):
            raise ValueError(f"kd_loss: impl={impl!r} cannot run under torch.func; use None")
        return "reference"
    return picked


class _Rows(torch.autograd.Function):
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
        ctx.numbers = (temperature, label_smoothing, ignore_index, class_dim)
        ctx.triton = triton
        ctx.save_for_backward(student, labels, weights, mask, *teachers)
        ctx.set_materialize_grads(False)
        op = _ops("_kd_loss", triton)
        parts = op(student, list(teachers), labels, weights, mask, *ctx.numbers)
        ctx.mark_non_differentiable(parts[2])
        return parts

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        student, labels, weights, mask, *teachers = ctx.saved_tensors
        grad = None
        if _twice():
            inputs = (student, teachers, labels, weights, mask, *ctx.numbers)
            grad = _reference_gradient(inputs, upstream[0], upstream[1])
        elif upstream[0] is not None or upstream[1] is not None:
            op = _ops("_kd_loss_grad", ctx.triton)
            grad = op(student, teachers, labels, weights, mask, *ctx.numbers, upstream[0],
                      upstream[1], None, 1.0, 1.0)  # fmt: skip
        return (grad, *[None] * (8 + len(teachers)))


class _Mean(torch.autograd.Function):
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
        ctx.numbers = (temperature, label_smoothing, ignore_index, class_dim)
        ctx.scales = (kd_weight, ce_weight)
        ctx.triton = triton
        # fp16 gradients come with a loss scale: a gradient stored without it would underflow.
        early = ctx.needs_input_grad[0] and _grad_in_forward(student)
        op = _ops("_kd_loss_mean", triton)
        loss, divisor, grad = op(student, list(teachers), labels, weights, mask, *ctx.numbers,
                                 *ctx.scales, early)  # fmt: skip
        ctx.save_for_backward(student, labels, weights, mask, divisor, *teachers)
        ctx.grad = grad if early else None
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, labels, weights, mask, divisor, *teachers = ctx.saved_tensors
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
                      divisor, *ctx.scales)  # fmt: skip
        return (grad, *[None] * (10 + len(teachers)))


class _MeanTraced(torch.autograd.Function):
    """`_Mean` as torch.compile sees it: no state outside the saved tensors, no look at a value."""

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
        ctx.numbers = (temperature, label_smoothing, ignore_index, class_dim)
        ctx.scales = (kd_weight, ce_weight)
        ctx.triton = triton
        ctx.early = student.requires_grad and _grad_in_forward(student) and student.dtype in _EXACT
        op = _ops("_kd_loss_mean", triton)
        loss, divisor, grad = op(student, list(teachers), labels, weights, mask, *ctx.numbers,
                                 *ctx.scales, ctx.early)  # fmt: skip
        if ctx.early:
            ctx.save_for_backward(grad)
        else:
            ctx.save_for_backward(student, labels, weights, mask, divisor, *teachers)
        ctx.num_teachers = len(teachers)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.early:
            (made,) = ctx.saved_tensors
            grad = made * upstream.to(made.dtype)
        else:
            student, labels, weights, mask, divisor, *teachers = ctx.saved_tensors
            op = _ops("_kd_loss_grad", ctx.triton)
            grad = op(student, teachers, labels, weights, mask, *ctx.numbers, upstream, upstream,
                      divisor, *ctx.scales)  # fmt: skip
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


def _grad_in_forward(student: Tensor) -> bool:
    return student.device.type == "cpu" and student.dtype != torch.float16


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


@torch.library.register_fake("fastkd::_kd_loss", lib=LIBRARY)
def _rows_fake(student, teachers, labels, weights, mask, *numbers):  # noqa: ANN001, ANN202
    shape = _row_shape(student, numbers[-1])
    return tuple(student.new_empty(shape, dtype=_wide(student, teachers)) for _ in range(3))


@torch.library.register_fake("fastkd::_kd_loss_grad", lib=LIBRARY)
def _grad_fake(student, teachers, labels, weights, mask, *numbers):  # noqa: ANN001, ANN202
    return torch.empty_like(student)


@torch.library.register_fake("fastkd::_kd_loss_mean", lib=LIBRARY)
def _mean_fake(student, teachers, labels, weights, mask, *numbers):  # noqa: ANN001, ANN202
    loss, divisor = (student.new_empty((), dtype=_wide(student, teachers)) for _ in range(2))
    return loss, divisor, torch.empty_like(student) if numbers[-1] else student.new_empty(0)


def _register() -> None:
    backends: dict[str, Impl] = {}
    if isinstance(core(), Core):
        from fastkd.kernels.kd_loss import cpu

        LIBRARY.impl("_kd_loss", cpu.rows, "CPU")
        LIBRARY.impl("_kd_loss_grad", cpu.grad, "CPU")
        LIBRARY.impl("_kd_loss_mean", cpu.mean, "CPU")
        backends["cpu"] = "cpp"
    register("kd_loss", backends)


_register()
