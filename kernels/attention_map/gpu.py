"""`attention_map` and its loss on CUDA tensors: launch shapes and launches of gpu_kernels.py.

Serves the three ops of this folder under the dispatcher's CUDA key, and CPU tensors under Triton's
interpreter. Block and warp choices come from `plan`, a pure function of shapes: nothing is asked of
a device, so results repeat bit by bit.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastkd.kernels.attention_map.gpu_kernels import forward_kernel, gradient_kernel
from fastkd.kernels.attention_map.inputs import Strides, gradient_like, readable
from fastkd.kernels.gpu_kernels import launch

__all__ = ["Plan", "energy", "energy_grad", "loss", "plan"]

# Pixels of the maps that the comparison holds at a time.
_COMPARED = 1024


class Plan(NamedTuple):
    """How a pass over features is launched: its tile [channels, pixels] and its warps."""

    block_c: int
    block_p: int
    warps: int


def plan(channels: int, pixels: int, by_pixel: bool, warps: int = 4) -> Plan:
    """Tile for `warps` warps or fewer; lanes run along the axis that is contiguous."""
    # Four or two 16-byte loads of bf16; sums along the lanes (channels-last) need registers too,
    # and so do the addresses of rows that are read in narrower loads.
    tile = warps * 32 * (32 if by_pixel and pixels % 8 == 0 else 16)
    width, height = (pixels, channels) if by_pixel else (channels, pixels)
    # 16 deep: each lane adds up few numbers, which keeps the rounding error small.
    width = min(tile // 16, triton.next_power_of_2(width))
    height = min(tile // width, triton.next_power_of_2(height))
    block_c, block_p = (height, width) if by_pixel else (width, height)
    return Plan(block_c, block_p, max(1, warps * width * height // tile))


def walks_whole_samples(samples: int, channels: int, pixels: int) -> bool:
    """One program per sample, which saves a launch; large samples need half a wave of programs."""
    return samples >= 64 or channels * pixels <= 1 << 16


def energy(features_NCHW: Tensor, power: int, window: Sequence[int]) -> Tensor:
    """Mean over channels of |window average|^power: [N, pixels of the map], fp32."""
    out_NP = _empty_map(features_NCHW, window)
    features_NCHW, strides = readable(features_NCHW)
    p = plan(features_NCHW.shape[1], out_NP.shape[1], strides.pixel == 1)
    _forward([(features_NCHW, strides, window)], [out_NP], power, p, phase=1)
    return out_NP


def loss(
    student_NCHW: Tensor,
    teacher_NCHW: Tensor,
    power: int,
    student_window: Sequence[int],
    teacher_window: Sequence[int],
    eps: float,
    distance: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its derivative at the student's energies, the teacher's energies [N, pixels]."""
    student_NP = _empty_map(student_NCHW, student_window)
    teacher_NP, coefficients_NP = torch.empty_like(student_NP), torch.empty_like(student_NP)
    rows_N = student_NP.new_empty(student_NP.shape[0])
    sides = [(*readable(student_NCHW), student_window), (*readable(teacher_NCHW), teacher_window)]
    channels, pixels = teacher_NCHW.shape[1], student_NP.shape[1]
    whole = walks_whole_samples(student_NP.shape[0], channels, pixels)
    # The teacher's map is usually the larger one: its layout decides.
    by_pixel = sides[1][1].pixel == 1
    p = plan(channels, pixels, by_pixel, 16 if whole else 4)
    outputs = [student_NP, teacher_NP, coefficients_NP, rows_N]
    for phase in (0,) if whole else (1, 2):
        _forward(sides, outputs, power, p, phase, eps, distance)
    return rows_N.sum(), coefficients_NP, teacher_NP


def energy_grad(
    features_NCHW: Tensor,
    coefficients_NP: Tensor,
    upstream: Tensor | None,
    power: int,
    window: Sequence[int],
) -> Tensor:
    """Gradient of `upstream * sum(coefficients * energy)` in the features' dtype and layout."""
    read_NCHW, strides = readable(features_NCHW)
    grad_NCHW, target_NCHW, out_strides = gradient_like(features_NCHW, strides)
    num, channels, _, width = features_NCHW.shape
    if num > 0:
        coefficients_NP = coefficients_NP.contiguous()
        pixels = coefficients_NP.shape[1]
        p = plan(channels, pixels, strides.pixel == 1)
        launch(
            gradient_kernel,
            (num * triton.cdiv(pixels, p.block_p), triton.cdiv(channels, p.block_c)),
            on=read_NCHW,
            x_ptr=read_NCHW,
            coefficient_ptr=coefficients_NP,
            upstream_ptr=upstream,
            g_ptr=target_NCHW,
            channels=channels,
            x_strides=_steps(strides, width),
            g_strides=_steps(out_strides, width),
            POWER=power,
            PIXELS=pixels,
            WIDTH=width // window[1],
            WINDOW_H=window[0],
            WINDOW_W=window[1],
            BY_PIXEL=strides.pixel == 1,
            ALIGN=_align(strides, out_strides),
            BLOCK_C=p.block_c,
            BLOCK_P=p.block_p,
            num_warps=p.warps,
        )
    return grad_NCHW if target_NCHW is grad_NCHW else grad_NCHW.copy_(target_NCHW)


def _forward(
    sides: list[tuple[Tensor, Strides, Sequence[int]]],
    outputs: list[Tensor],
    power: int,
    p: Plan,
    phase: int,
    eps: float = 1.0,
    distance: bool = False,
) -> None:
    """One launch for the energies (of one side or two), the comparison, or both.

    outputs: energies of each side; for a comparison also the coefficients and the samples' losses.
    """
    (student_NCHW, s, s_window), (teacher_NCHW, t, t_window) = sides[0], sides[-1]
    num, pixels = outputs[0].shape
    if num == 0:
        return
    student_NP, teacher_NP, coefficients_NP, rows_N = (*outputs, None, None, None)[:4]
    tile = p.block_c * p.block_p
    block_s, block_t = (
        min(tile // p.block_p, triton.next_power_of_2(x.shape[1]))
        for x in (student_NCHW, teacher_NCHW)
    )
    programs = num * triton.cdiv(pixels, p.block_p) if phase == 1 else num
    launch(
        forward_kernel,
        (programs,),
        on=student_NCHW,
        s_ptr=student_NCHW,
        t_ptr=teacher_NCHW if len(sides) == 2 else None,
        s_energy_ptr=student_NP,
        t_energy_ptr=teacher_NP,
        coefficient_ptr=coefficients_NP,
        rows_ptr=rows_N,
        s_channels=student_NCHW.shape[1],
        t_channels=teacher_NCHW.shape[1],
        s_strides=_steps(s, student_NCHW.shape[3]),
        t_strides=_steps(t, teacher_NCHW.shape[3]),
        samples=float(num),
        eps=eps,
        POWER=power,
        PIXELS=pixels,
        WIDTH=student_NCHW.shape[3] // s_window[1],
        S_H=s_window[0],
        S_W=s_window[1],
        T_H=t_window[0],
        T_W=t_window[1],
        S_BY_PIXEL=s.pixel == 1,
        T_BY_PIXEL=t.pixel == 1,
        S_ALIGN=_align(s),
        T_ALIGN=_align(t),
        DISTANCE=distance,
        PHASE=phase,
        BLOCK_S=block_s,
        BLOCK_T=block_t,
        BLOCK_P=p.block_p,
        BLOCK_X=min(_COMPARED, triton.next_power_of_2(pixels)),
        num_warps=p.warps if phase != 2 else 4,
    )


def _empty_map(features_NCHW: Tensor, window: Sequence[int]) -> Tensor:
    num, _, height, width = features_NCHW.shape
    return features_NCHW.new_empty(num, height * width // math.prod(window), dtype=torch.float32)


def _steps(strides: Strides, width: int) -> tuple[int, int, int, int]:
    """Strides of sample, channel, row and pixel."""
    return strides.sample, strides.channel, width * strides.pixel, strides.pixel


def _align(*views: Strides) -> int:
    """Samples, and lines along the contiguous axis, begin at multiples of this many elements."""
    steps = [s for v in views for s in (v.sample, v.channel if v.pixel == 1 else v.pixel)]
    return math.gcd(16, *steps)
