"""`kd_loss` on CUDA tensors: layouts, launch shapes and launches of gpu_kernels.py.

Serves the three ops of this folder under the dispatcher's CUDA key, and CPU tensors under Triton's
interpreter. Block and warp choices come from `plan`, a pure function of shapes: nothing is asked of
a device, so results repeat bit by bit.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from fastkd.kernels.gpu_kernels import launch
from fastkd.kernels.kd_loss.gpu_kernels import forward_kernel, gradient_kernel, reduce_kernel
from torch import Tensor

__all__ = ["Plan", "grad", "mean", "plan", "rows"]


class Plan(NamedTuple):
    """How a shape is launched: tile of the forward pass, programs per row, tile of the gradient."""

    block_r: int
    block_c: int
    warps: int
    splits: int
    grad_block_r: int
    grad_block_c: int
    grad_warps: int


def plan(rows: int, classes: int, class_stride: int) -> Plan:
    """Tiles and warps for a shape; `class_stride` is 1 where classes are contiguous."""
    width = max(2, triton.next_power_of_2(classes))
    if class_stride != 1:
        # Lanes run over pixels: 64 of them make 128-byte rows in bf16.
        block_c = min(width, 32)
        return Plan(64, block_c, 4, 1, 64, min(width, 16), 4)
    if width <= 4096:
        block_r = max(1, 1024 // width)
        warps = 4 if width <= 2048 else 8
        return Plan(block_r, width, warps, 1, block_r, min(width, 2048), 4)
    # Below about half a wave of rows, one program per row would leave most of a chip idle.
    splits = min(64, width // 8192) if rows <= 64 and width >= 32768 else 1
    return Plan(1, 4096, 8, splits, 1, 2048, 4)


class _View(NamedTuple):
    """A tensor as the kernels address it: samples, pixels and classes with their strides."""

    data: Tensor
    inner: int
    strides: tuple[int, int, int]


def _view(x: Tensor, class_dim: int) -> _View:
    if x.dim() > 2 and class_dim == 1:
        flat = x.flatten(2)
        return _View(flat, flat.shape[2], (flat.stride(0), flat.stride(2), flat.stride(1)))
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return _View(flat, 1, (flat.stride(0), 0, flat.stride(1)))


def _arguments(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    class_dim: int,
) -> tuple[list[Tensor], list[Any], dict[str, Any], _View]:
    """Pointers, sizes with strides, and compile-time flags that both kernels begin with."""
    s = _view(student, class_dim)
    views = [_view(t, class_dim) for t in teachers]
    if len({v.strides for v in views}) > 1:
        views = [_view(t.contiguous(), class_dim) for t in teachers]
    kind, y, y_strides = 0, student, (0, 0, 0)
    if labels is not None:
        kind = 2 if labels.is_floating_point() else 1
        view = _view(labels, class_dim) if kind == 2 else _View(labels.contiguous(), 1, (0, 0, 0))
        y, y_strides = view.data, view.strides
    t_strides = views[0].strides if views else (0, 0, 0)
    # Absent tensors are never read: any pointer does.
    data = [v.data for v in views] + [s.data] * (4 - len(views))
    rest = [x.contiguous() if x is not None else s.data for x in (weights, mask)]
    if mask is not None:
        rest[1] = rest[1].view(torch.uint8)
    classes = student.shape[class_dim]
    sizes = [student.numel() // classes, s.inner, *s.strides, *t_strides, *y_strides]
    align = math.gcd(16, s.strides[0], t_strides[0], y_strides[0]) if s.inner == 1 else 0
    flags = {
        "TEACHERS": len(teachers),
        "LABELS": kind,
        "WEIGHTS": weights is not None,
        "MASK": mask is not None,
        "CLASSES": classes,
        "ALIGN": align,
    }
    return [s.data, *data, y, *rest], sizes, flags, s


def _forward(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    numbers: tuple[float, float, int, int],
    scales: tuple[float, float],
    outputs: list[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Fills per-row outputs, or returns the programs' partial sums; and the statistics."""
    temperature, smoothing, ignore_index, class_dim = numbers
    pointers, sizes, flags, s = _arguments(student, teachers, labels, weights, mask, class_dim)
    num_rows, classes = sizes[0], flags["CLASSES"]
    p = plan(num_rows, classes, s.strides[2])
    splits = p.splits if len(teachers) == 1 else 1
    programs = triton.cdiv(num_rows, p.block_r)
    stats = student.new_empty((4 + 2 * len(teachers)) * num_rows, dtype=torch.float32)
    partial = student.new_empty(0 if outputs else 2 * programs, dtype=torch.float32)
    work = student.new_empty(11 * splits * num_rows if splits > 1 else 0, dtype=torch.float32)
    if num_rows == 0:
        return partial, stats
    targets = [*(outputs or [stats] * 3), stats, partial, work]
    flags |= {
        "SMOOTH": smoothing > 0,
        "PER_ROW": outputs is not None,
        "ONE_TILE": classes <= p.block_c,
        "SPLITS": triton.next_power_of_2(splits),
        "BLOCK_R": p.block_r,
        "BLOCK_C": p.block_c,
        "num_warps": p.warps,
    }
    rest = [temperature, smoothing, ignore_index, *scales, splits]
    phases = [((programs, 1), 0)] if splits == 1 else [((programs, splits), 1), ((programs, 1), 2)]
    for grid, phase in phases:
        launch(forward_kernel, grid, *pointers, *targets, *sizes, *rest, PHASE=phase, **flags)
    return partial, stats


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
    """Per-row losses and the statistics that the gradient needs."""
    shape = student.movedim(class_dim, -1).shape[:-1]
    parts = [student.new_empty(shape, dtype=torch.float32) for _ in range(3)]
    numbers = (temperature, label_smoothing, ignore_index, class_dim)
    _, stats = _forward(student, teachers, labels, weights, mask, numbers, (1.0, 1.0), parts)
    return parts[0], parts[1], parts[2], stats


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
    """The weighted mean, the divisor, no gradient (it is made in the backward pass), statistics."""
    assert not with_grad
    numbers = (temperature, label_smoothing, ignore_index, class_dim)
    scales = (kd_weight, ce_weight)
    partial, stats = _forward(student, teachers, labels, weights, mask, numbers, scales, None)
    loss, divisor = (student.new_empty((), dtype=torch.float32) for _ in range(2))
    size = partial.numel() // 2
    launch(reduce_kernel, (1,), partial, loss, divisor, size, BLOCK=1024, num_warps=4)
    return loss, divisor, student.new_empty(0), stats


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
    """Gradient at the student from the statistics of the forward pass."""
    pointers, sizes, flags, s = _arguments(student, teachers, labels, weights, mask, class_dim)
    num_rows, classes = sizes[0], flags["CLASSES"]
    out = torch.empty_like(student)
    if num_rows == 0:
        return out
    view = _view(out, class_dim)
    p = plan(num_rows, classes, s.strides[2])
    ups, steps = [], []
    for up in (upstream_kd, upstream_ce):
        one = up is None or up.numel() == 1 or not any(up.stride())
        ups.append(stats if up is None else up.reshape(-1)[:1] if one else up.contiguous())
        steps.append(0 if one else 1)
    if flags["ALIGN"]:
        flags["ALIGN"] = math.gcd(flags["ALIGN"], view.strides[0])
    flags |= {
        "SMOOTH": label_smoothing > 0,
        "DIVISOR": divisor is not None,
        "KD": upstream_kd is not None and len(teachers) > 0,
        "CE": upstream_ce is not None and labels is not None,
        "BLOCK_R": p.grad_block_r,
        "BLOCK_C": p.grad_block_c,
        "num_warps": p.grad_warps,
    }
    grid = (triton.cdiv(num_rows, p.grad_block_r), triton.cdiv(classes, p.grad_block_c))
    by = divisor if divisor is not None else stats
    numbers = [temperature, label_smoothing, ignore_index, kd_scale, ce_scale, *steps]
    launch(
        gradient_kernel, grid, *pointers, view.data, stats, *ups, by, *sizes, *view.strides,
        *numbers, **flags,
    )  # fmt: skip
    # flatten() copies where the strides do not collapse.
    return out if view.data.data_ptr() == out.data_ptr() else out.copy_(view.data.view(out.shape))
