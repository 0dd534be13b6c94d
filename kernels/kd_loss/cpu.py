"""`kd_loss` on CPU tensors through the C++ core: layouts, one packed argument, one call.

Serves the three ops of this folder under the dispatcher's CPU key. The argument layout is
`KdLossArgs` in args.h.
"""

import struct
from collections.abc import Sequence

import torch
from fastkd.kernels._library import STORAGE, entry_point
from torch import Tensor

__all__ = ["grad", "mean", "rows"]

_ARGS = struct.Struct("16Q18q4d")
# Up to this many classes the lanes of a vector run over rows: a row alone would not fill them.
_TILE_CLASSES = 32


def rows(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    class_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-row losses, see `fastkd.kernels.kd_loss`, and no statistics."""
    shape = student.movedim(class_dim, -1).shape[:-1]
    wide = _working_dtype(student, teachers)
    kd, ce, agree = (torch.empty(shape, dtype=wide) for _ in range(3))
    _call(student, teachers, labels, weights, mask, temperature, label_smoothing, ignore_index,
          class_dim, kd=kd, ce=ce, agree=agree)  # fmt: skip
    return kd, ce, agree, student.new_empty(0, dtype=torch.float32)


def grad(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    class_dim: int,
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
    out = torch.empty_like(student)
    _call(student, teachers, labels, weights, mask, temperature, label_smoothing, ignore_index,
          class_dim, out=out, upstream_kd=upstream_kd, upstream_ce=upstream_ce,
          kd_scale=kd_scale if upstream_kd is not None else 0.0,
          ce_scale=ce_scale if upstream_ce is not None else 0.0)  # fmt: skip
    return out


def mean(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    class_dim: int,
    kd_weight: float,
    ce_weight: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weighted mean, the rows that count (at least 1), the gradient, no statistics."""
    wide = _working_dtype(student, teachers)
    loss, divisor = torch.empty((), dtype=wide), torch.empty((), dtype=wide)
    out = torch.empty_like(student) if with_grad else student.new_empty(0)
    _call(student, teachers, labels, weights, mask, temperature, label_smoothing, ignore_index,
          class_dim, out=out if with_grad else None, loss=loss, divisor=divisor,
          kd_scale=kd_weight, ce_scale=ce_weight)  # fmt: skip
    return loss, divisor, out, student.new_empty(0, dtype=torch.float32)


def _working_dtype(student: Tensor, teachers: Sequence[Tensor]) -> torch.dtype:
    if student.dtype == torch.float64:
        return torch.float64
    for teacher in teachers:
        if teacher.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _call(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    label_smoothing: float,
    ignore_index: int,
    class_dim: int,
    *,
    kd: Tensor | None = None,
    ce: Tensor | None = None,
    agree: Tensor | None = None,
    out: Tensor | None = None,
    loss: Tensor | None = None,
    divisor: Tensor | None = None,
    upstream_kd: Tensor | None = None,
    upstream_ce: Tensor | None = None,
    kd_scale: float = 1.0,
    ce_scale: float = 1.0,
    isa: str | None = None,
) -> None:
    """Fills the outputs that are given. `isa` picks a clone, for benchmarks and tests."""
    wide = _working_dtype(student, teachers)
    classes = student.shape[class_dim]
    inner, student = _layout(student, class_dim)
    by_class = inner == 1
    teachers = [_match(t, class_dim, by_class) for t in teachers]
    if len({t.dtype for t in teachers}) > 1:
        teachers = [t.to(wide) for t in teachers]
    label_kind = 0
    if labels is not None:
        label_kind = 2 if labels.is_floating_point() else 1
        if label_kind == 2:
            labels = _match(labels.to(wide), class_dim, by_class).contiguous()
        else:
            labels = labels.contiguous()
    weights = None if weights is None else weights.to(wide).contiguous()
    mask = None if mask is None else mask.contiguous()
    kd_step = ce_step = 0
    if upstream_kd is not None:
        upstream_kd, kd_step = _upstream(upstream_kd, wide)
    if upstream_ce is not None:
        upstream_ce, ce_step = _upstream(upstream_ce, wide)
    target = out
    if out is not None and not _fits(out, class_dim, inner):
        target = torch.empty_like(student, memory_format=torch.contiguous_format)
    rows = student.numel() // classes
    pointer = [0 if t is None else t.data_ptr() for t in (labels, weights, mask, upstream_kd,
               upstream_ce, kd, ce, agree, target, loss, divisor)]  # fmt: skip
    absent = [0] * (4 - len(teachers))
    packed = _ARGS.pack(
        student.data_ptr(), *[t.data_ptr() for t in teachers], *absent, *pointer,
        rows, classes, inner, student.stride(0), *[t.stride(0) for t in teachers], *absent,
        STORAGE[student.dtype], STORAGE[teachers[0].dtype] if teachers else 0,
        label_kind, len(teachers), ignore_index, torch.get_num_threads(),
        loss is not None, by_class and classes <= _TILE_CLASSES, kd_step, ce_step,
        temperature, label_smoothing, kd_scale, ce_scale,
    )  # fmt: skip
    code = entry_point("kd_loss", isa)(packed)
    if code > 0:
        assert labels is not None
        raise ValueError(
            f"kd_loss: label {labels.reshape(-1)[code - 1].item()} in row {code - 1} is no class: "
            f"the logits have {classes} classes (0 to {classes - 1}) and ignore_index is "
            f"{ignore_index}"
        )
    if code < 0:
        raise MemoryError(f"kd_loss: no memory for the scratch of rows of {classes} classes")
    if out is not None and target is not None and target is not out:
        by_row = out.movedim(class_dim, -1)
        by_row.copy_(target.view(by_row.shape) if by_class else target.movedim(class_dim, -1))


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
    if inner > 1 or out.dim() == 2:
        return out.is_contiguous()
    return out.movedim(class_dim, -1).is_contiguous()


def _upstream(x: Tensor, wide: torch.dtype) -> tuple[Tensor, int]:
    """(tensor, step): an incoming gradient per row (step 1) or one for all rows (step 0)."""
    if x.dim() == 0 or x.numel() == 1 or not any(x.stride()):
        return x.reshape(-1)[:1].to(wide), 0
    return x.to(wide).contiguous(), 1
