"""`kd_loss` on CUDA tensors: layouts, launch shapes and launches of gpu_kernels.py.

Serves the three ops of this folder under the dispatcher's CUDA key, and CPU tensors under Triton's
interpreter. Block and warp choices come from `plan`, a pure function of shapes: nothing is asked of
a device, so results repeat bit by bit.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastkd.kernels.gpu_kernels import launch
from fastkd.kernels.kd_loss.gpu_kernels import (
    forward_kernel,
    gradient_kernel,
    part_kernel,
    reduce_kernel,
)
from fastkd.kernels.kd_loss.gpu_rows import HARD, PARTS, SOFT
from fastkd.kernels.kd_loss.inputs import Inputs

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
        return Plan(
            block_r=64,
            block_c=min(width, 32),
            warps=4,
            splits=1,
            grad_block_r=64,
            grad_block_c=min(width, 16),
            grad_warps=4,
        )
    if width <= 4096:
        block_r = max(1, 1024 // width)
        return Plan(
            block_r=block_r,
            block_c=width,
            warps=4 if width <= 2048 else 8,
            splits=1,
            grad_block_r=block_r,
            grad_block_c=min(width, 2048),
            grad_warps=4,
        )
    return Plan(
        block_r=1,
        block_c=4096,
        warps=8,
        # With fewer rows than half a wave, one program per row would leave most of a chip idle.
        splits=min(64, width // 8192) if rows <= 64 and width >= 32768 else 1,
        grad_block_r=1,
        grad_block_c=2048,
        grad_warps=4,
    )


class _View(NamedTuple):
    """A tensor as the kernels address it."""

    data: Tensor
    inner: int
    """Pixels of a sample."""
    strides: tuple[int, int, int]
    """Of sample, pixel and class."""


_NOWHERE = (0, 0, 0)


def _view(x: Tensor, class_dim: int) -> _View:
    if x.dim() > 2 and class_dim == 1:
        flat = x.flatten(2)
        return _View(flat, flat.shape[2], (flat.stride(0), flat.stride(2), flat.stride(1)))
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return _View(flat, 1, (flat.stride(0), 0, flat.stride(1)))


def _arguments(inputs: Inputs) -> dict[str, Any]:
    """Arguments that the forward and the gradient kernel share, by name."""
    class_dim = inputs.class_dim
    s = _view(inputs.student, class_dim)
    teachers = [_view(t, class_dim) for t in inputs.teachers]
    if len({t.strides for t in teachers}) > 1:
        teachers = [_view(t.contiguous(), class_dim) for t in inputs.teachers]
    t_strides = teachers[0].strides if teachers else _NOWHERE
    labels, y_ptr, y_strides = 0, None, _NOWHERE
    if inputs.labels is not None and inputs.labels.is_floating_point():
        labels = SOFT.value
        y_ptr, _, y_strides = _view(inputs.labels, class_dim)
    elif inputs.labels is not None:
        labels, y_ptr = HARD.value, inputs.labels.contiguous()
    mask = None if inputs.mask is None else inputs.mask.contiguous().view(torch.uint8)
    classes = inputs.student.shape[class_dim]
    return {
        "s_ptr": s.data,
        # An empty tuple would have no type. Without teachers it is not read.
        "t_ptrs": tuple(t.data for t in teachers) or (s.data,),
        "y_ptr": y_ptr,
        "w_ptr": None if inputs.weights is None else inputs.weights.contiguous(),
        "mask_ptr": mask,
        "num_rows": inputs.student.numel() // classes,
        "inner": s.inner,
        "s_strides": s.strides,
        "t_strides": t_strides,
        "y_strides": y_strides,
        "temperature": inputs.temperature,
        "smoothing": inputs.label_smoothing,
        "ignore_index": inputs.ignore_index,
        "TEACHERS": len(teachers),
        "LABELS": labels,
        "SMOOTH": inputs.label_smoothing > 0,
        "ALIGN": math.gcd(16, s.strides[0], t_strides[0], y_strides[0]) if s.inner == 1 else 0,
        "CLASSES": classes,
    }


# The arguments of `_arguments` that a part needs.
_OF_PARTS = (
    "s_ptr",
    "num_rows",
    "inner",
    "s_strides",
    "t_strides",
    "y_strides",
    "temperature",
    "LABELS",
    "SMOOTH",
    "ALIGN",
    "CLASSES",
)


def _forward(
    inputs: Inputs, scales: tuple[float, float], outputs: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Fill per-row outputs, or return the programs' partial sums; and the statistics."""
    student = inputs.student
    arguments = _arguments(inputs)
    num_rows, classes = arguments["num_rows"], arguments["CLASSES"]
    p = plan(num_rows, classes, arguments["s_strides"][2])
    splits = p.splits if len(inputs.teachers) == 1 else 1
    programs = triton.cdiv(num_rows, p.block_r)
    stats = student.new_empty((4 + 2 * len(inputs.teachers)) * num_rows, dtype=torch.float32)
    partial = student.new_empty(0 if outputs else 2 * programs, dtype=torch.float32)
    if num_rows == 0:
        return partial, stats
    tile = {"BLOCK_R": p.block_r, "BLOCK_C": p.block_c, "num_warps": p.warps}
    work = None
    if splits > 1:
        work = student.new_empty(PARTS.value * splits * num_rows, dtype=torch.float32)
        launch(
            part_kernel,
            (programs, splits),
            on=student,
            t_ptr=arguments["t_ptrs"][0],
            y_ptr=arguments["y_ptr"],
            work_ptr=work,
            splits=splits,
            PER_ROW=outputs is not None,
            **{name: arguments[name] for name in _OF_PARTS},
            **tile,
        )
    kd, ce, agree = outputs or (None, None, None)
    launch(
        forward_kernel,
        (programs, 1),
        on=student,
        kd_ptr=kd,
        ce_ptr=ce,
        agree_ptr=agree,
        partial_ptr=None if outputs else partial,
        stats_ptr=stats,
        work_ptr=work,
        kd_weight=scales[0],
        ce_weight=scales[1],
        splits=splits,
        ONE_TILE=classes <= p.block_c,
        SPLITS=triton.next_power_of_2(splits),
        **arguments,
        **tile,
    )
    return partial, stats


def rows(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-row losses and the statistics that the gradient needs."""
    shape = inputs.student.movedim(inputs.class_dim, -1).shape[:-1]
    parts = [inputs.student.new_empty(shape, dtype=torch.float32) for _ in range(3)]
    _, stats = _forward(inputs, (1.0, 1.0), parts)
    return parts[0], parts[1], parts[2], stats


def mean(
    inputs: Inputs, kd_weight: float, ce_weight: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weighted mean, the divisor, no gradient (it is made in the backward pass), statistics."""
    assert not with_grad
    student = inputs.student
    partial, stats = _forward(inputs, (kd_weight, ce_weight), None)
    loss, divisor = (student.new_empty((), dtype=torch.float32) for _ in range(2))
    launch(
        reduce_kernel,
        (1,),
        on=student,
        partial_ptr=partial,
        loss_ptr=loss,
        divisor_ptr=divisor,
        num_partials=partial.numel() // 2,
        BLOCK=1024,
        num_warps=4,
    )
    return loss, divisor, student.new_empty(0), stats


def grad(
    inputs: Inputs,
    upstream_kd: Tensor | None,
    upstream_ce: Tensor | None,
    divisor: Tensor | None,
    stats: Tensor,
    kd_scale: float,
    ce_scale: float,
) -> Tensor:
    """Gradient at the student from the statistics of the forward pass."""
    arguments = _arguments(inputs)
    num_rows, classes = arguments["num_rows"], arguments["CLASSES"]
    out = torch.empty_like(inputs.student)
    if num_rows == 0:
        return out
    view = _view(out, inputs.class_dim)
    p = plan(num_rows, classes, arguments["s_strides"][2])
    kd_ptr, kd_step = _upstream(upstream_kd)
    ce_ptr, ce_step = _upstream(upstream_ce)
    if arguments["ALIGN"]:
        arguments["ALIGN"] = math.gcd(arguments["ALIGN"], view.strides[0])
    launch(
        gradient_kernel,
        (triton.cdiv(num_rows, p.grad_block_r), triton.cdiv(classes, p.grad_block_c)),
        on=out,
        g_ptr=view.data,
        stats_ptr=stats,
        up_kd_ptr=kd_ptr,
        up_ce_ptr=ce_ptr,
        divisor_ptr=divisor,
        g_strides=view.strides,
        kd_scale=kd_scale,
        ce_scale=ce_scale,
        up_kd_step=kd_step,
        up_ce_step=ce_step,
        BLOCK_R=p.grad_block_r,
        BLOCK_C=p.grad_block_c,
        num_warps=p.grad_warps,
        **arguments,
    )
    # flatten() copies where the strides do not collapse.
    return out if view.data.data_ptr() == out.data_ptr() else out.copy_(view.data.view(out.shape))


def _upstream(x: Tensor | None) -> tuple[Tensor | None, int]:
    """(tensor, step): an incoming gradient per row (step 1) or one for all rows (step 0)."""
    if x is None:
        return None, 0
    if x.numel() == 1 or not any(x.stride()):
        return x.reshape(-1)[:1], 0
    return x.contiguous(), 1
