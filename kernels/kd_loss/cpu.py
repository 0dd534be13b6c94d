"""`kd_loss` on CPU tensors through the C++ core: layouts, one packed argument, one call.

Serves the three ops of this folder under the dispatcher's CPU key. Packed argument: `KdLossArgs` in
args.h.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.kernels._library import STORAGE, Arguments, entry_point
from fastkd.kernels.kd_loss.inputs import MAX_TEACHERS, Inputs

__all__ = ["Outputs", "Upstream", "fill", "grad", "mean", "rows"]

_ARGUMENTS = Arguments(
    student="P",
    teacher=f"{MAX_TEACHERS}Q",
    labels="P",
    temperature="d",
    label_smoothing="d",
    ignore_index="q",
    weights="P",
    mask="P",
    upstream_kd="P",
    upstream_ce="P",
    upstream_kd_step="q",
    upstream_ce_step="q",
    kd_scale="d",
    ce_scale="d",
    kd="P",
    ce="P",
    agree="P",
    grad="P",
    loss="P",
    divisor="P",
    average="q",
    rows="q",
    classes="q",
    inner="q",
    student_stride="q",
    teacher_stride=f"{MAX_TEACHERS}q",
    student_type="q",
    teacher_type="q",
    label_kind="q",
    num_teachers="q",
    tile="q",
    threads="q",
)
# `LabelKind` in args.h.
_NO_LABELS, _HARD_LABELS, _SOFT_LABELS = range(3)
# Up to this many classes the lanes of a vector run over rows: a row alone would not fill them.
_TILE_CLASSES = 32


class Outputs(NamedTuple):
    """Tensors to fill, or None."""

    kd: Tensor | None = None
    ce: Tensor | None = None
    agree: Tensor | None = None
    grad: Tensor | None = None
    """Of kd_scale * kd + ce_scale * ce, in the student's layout."""
    loss: Tensor | None = None
    """If given, the loss is the mean over the rows that count, and so is the gradient's."""
    divisor: Tensor | None = None


class Upstream(NamedTuple):
    """What the gradients of kd and ce are multiplied with."""

    kd: Tensor | None = None
    """One per row, or one for all."""
    ce: Tensor | None = None
    kd_scale: float = 1.0
    ce_scale: float = 1.0


def rows(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-row losses, see `fastkd.kernels.kd_loss`, and no statistics."""
    shape = inputs.student.movedim(inputs.class_dim, -1).shape[:-1]
    wide = _working_dtype(inputs)
    kd, ce, agree = (torch.empty(shape, dtype=wide) for _ in range(3))
    fill(inputs, Outputs(kd, ce, agree), Upstream())
    return kd, ce, agree, _no_statistics(inputs)


def grad(
    inputs: Inputs,
    upstream_kd: Tensor | None,
    upstream_ce: Tensor | None,
    divisor: Tensor | None,
    stats: Tensor,
    kd_scale: float,
    ce_scale: float,
) -> Tensor:
    """Gradient of `sum(upstream_kd * kd_scale * kd + upstream_ce * ce_scale * ce) / divisor`."""
    if divisor is not None:
        rows_that_count = divisor.item()
        kd_scale, ce_scale = kd_scale / rows_that_count, ce_scale / rows_that_count
    out = torch.empty_like(inputs.student)
    upstream = Upstream(
        upstream_kd,
        upstream_ce,
        kd_scale if upstream_kd is not None else 0.0,
        ce_scale if upstream_ce is not None else 0.0,
    )
    fill(inputs, Outputs(grad=out), upstream)
    return out


def mean(
    inputs: Inputs, kd_weight: float, ce_weight: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weighted mean, the rows that count (at least 1), the gradient, no statistics."""
    student, wide = inputs.student, _working_dtype(inputs)
    loss, divisor = torch.empty((), dtype=wide), torch.empty((), dtype=wide)
    out = torch.empty_like(student) if with_grad else None
    outputs = Outputs(grad=out, loss=loss, divisor=divisor)
    fill(inputs, outputs, Upstream(kd_scale=kd_weight, ce_scale=ce_weight))
    grad = student.new_empty(0) if out is None else out
    return loss, divisor, grad, _no_statistics(inputs)


def _no_statistics(inputs: Inputs) -> Tensor:
    return inputs.student.new_empty(0, dtype=torch.float32)


def _working_dtype(inputs: Inputs) -> torch.dtype:
    if inputs.student.dtype == torch.float64:
        return torch.float64
    for teacher in inputs.teachers:
        if teacher.dtype == torch.float64:
            return torch.float64
    return torch.float32


def fill(inputs: Inputs, outputs: Outputs, upstream: Upstream, isa: str | None = None) -> None:
    """Fill the outputs that are given. `isa` picks a clone, for benchmarks and tests."""
    wide, class_dim = _working_dtype(inputs), inputs.class_dim
    classes = inputs.student.shape[class_dim]
    inner, student = _layout(inputs.student, class_dim)
    by_class = inner == 1
    teachers = [_match(t, class_dim, by_class) for t in inputs.teachers]
    if len({t.dtype for t in teachers}) > 1:
        teachers = [t.to(wide) for t in teachers]
    label_kind, labels = _NO_LABELS, inputs.labels
    if labels is not None and labels.is_floating_point():
        label_kind = _SOFT_LABELS
        labels = _match(labels.to(wide), class_dim, by_class).contiguous()
    elif labels is not None:
        label_kind = _HARD_LABELS
        labels = labels.contiguous()
    weights = None if inputs.weights is None else inputs.weights.to(wide).contiguous()
    mask = None if inputs.mask is None else inputs.mask.contiguous()
    upstream_kd, kd_step = _incoming(upstream.kd, wide)
    upstream_ce, ce_step = _incoming(upstream.ce, wide)
    grad = outputs.grad
    if grad is not None and not _fits(grad, class_dim, inner):
        grad = torch.empty_like(student, memory_format=torch.contiguous_format)
    absent = [0] * (MAX_TEACHERS - len(teachers))
    packed = _ARGUMENTS.pack(
        student=student,
        teacher=[t.data_ptr() for t in teachers] + absent,
        labels=labels,
        temperature=inputs.temperature,
        label_smoothing=inputs.label_smoothing,
        ignore_index=inputs.ignore_index,
        weights=weights,
        mask=mask,
        upstream_kd=upstream_kd,
        upstream_ce=upstream_ce,
        upstream_kd_step=kd_step,
        upstream_ce_step=ce_step,
        kd_scale=upstream.kd_scale,
        ce_scale=upstream.ce_scale,
        kd=outputs.kd,
        ce=outputs.ce,
        agree=outputs.agree,
        grad=grad,
        loss=outputs.loss,
        divisor=outputs.divisor,
        average=outputs.loss is not None,
        rows=student.numel() // classes,
        classes=classes,
        inner=inner,
        student_stride=student.stride(0),
        teacher_stride=[t.stride(0) for t in teachers] + absent,
        student_type=STORAGE[student.dtype],
        teacher_type=STORAGE[teachers[0].dtype] if teachers else 0,
        label_kind=label_kind,
        num_teachers=len(teachers),
        tile=by_class and classes <= _TILE_CLASSES,
        threads=torch.get_num_threads(),
    )
    code = entry_point("kd_loss", _ARGUMENTS, isa)(packed)
    if code > 0:
        assert labels is not None
        label = labels.reshape(-1)[code - 1].item()
        raise ValueError(
            f"kd_loss: label {label} in row {code - 1} is out of range: the logits have {classes} "
            f"classes (0 to {classes - 1}) and ignore_index is {inputs.ignore_index}"
        )
    if code < 0:
        raise MemoryError(f"kd_loss: no memory for the scratch of rows of {classes} classes")
    if grad is not None and grad is not outputs.grad:
        assert outputs.grad is not None
        by_row = outputs.grad.movedim(class_dim, -1)
        by_row.copy_(grad.view(by_row.shape) if by_class else grad.movedim(class_dim, -1))


def _layout(x: Tensor, class_dim: int) -> tuple[int, Tensor]:
    """(distance between classes, tensor): the input itself where the kernels can read it."""
    if x.dim() == 2:
        return 1, x if x.stride(1) == 1 else x.contiguous()
    if class_dim != 1:
        return 1, x.contiguous().view(-1, x.shape[-1])
    if x.is_contiguous():
        return max(1, x.numel() // max(1, x.shape[0] * x.shape[1])), x
    channels_last = x.movedim(1, -1)
    if channels_last.is_contiguous():
        return 1, channels_last.view(-1, x.shape[1])
    return _layout(x.contiguous(), class_dim)


def _match(x: Tensor, class_dim: int, by_class: bool) -> Tensor:
    """The tensor in the student's layout: classes contiguous as [rows, C], or as it is in NCHW."""
    if not by_class:
        return x.contiguous()
    if x.dim() == 2:
        return x if x.stride(1) == 1 else x.contiguous()
    return x.movedim(class_dim, -1).contiguous().view(-1, x.shape[class_dim])


def _fits(out: Tensor, class_dim: int, inner: int) -> bool:
    """Whether the kernels can write a gradient there in the student's layout."""
    if inner > 1 or out.dim() == 2:
        return out.is_contiguous()
    return out.movedim(class_dim, -1).is_contiguous()


def _incoming(x: Tensor | None, wide: torch.dtype) -> tuple[Tensor | None, int]:
    """(tensor, step): an incoming gradient per row (step 1) or one for all rows (step 0)."""
    if x is None:
        return None, 0
    if x.dim() == 0 or x.numel() == 1 or not any(x.stride()):
        return x.reshape(-1)[:1].to(wide), 0
    return x.to(wide).contiguous(), 1
