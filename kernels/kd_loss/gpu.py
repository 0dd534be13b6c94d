"""`kd_loss` in Triton: forward, mean and gradient, in the formulas of README.md.

A program owns a tile of [BLOCK_R rows, BLOCK_C classes]. Rows that fit one tile are read once; longer
ones are walked with a running maximum; few and very long ones are split over programs and merged.
The forward pass leaves three numbers per row and two per teacher (maxima and log2 of the sums), from
which the gradient is one elementwise pass.

Names in kernels: b_ block values, m_ masks, o_ offsets; s student, t teacher. Addresses are int64.
Block and warp choices come from `plan`, a pure function of shapes: nothing is asked of a device.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Plan", "forward_kernel", "grad", "gradient_kernel", "mean", "plan", "rows"]

# Below this KL (nats, without T^2) the sum is taken again in a form without cancellation.
NEAR_EQUAL = tl.constexpr(0.1)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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


@triton.jit
def _phi(u):
    """exp(-u) - 1 + u for |u| <= 1, relative error below 1e-8 before rounding."""
    q = u * -2.7727e-06 + 2.5342e-05
    q = q * u + -1.98442e-04
    q = q * u + 1.388548e-03
    q = q * u + -8.33330e-03
    q = q * u + 4.166668e-02
    q = q * u + -1.6666667e-01
    q = q * u + 0.5
    return q * (u * u)


@triton.jit
def _kl_term(p, q, u):
    """p * (exp(-u) - 1 + u) with u = log(p / q): one never negative term of KL(p || q)."""
    far = tl.maximum(p * u - (p - q), 0.0)
    term = tl.where(tl.abs(u) < 1.0, p * _phi(u), far)
    # maximum() drops NaN and a class of probability 0 has no logarithm.
    return tl.where(p > 0.0, term, q) + (u - u) * p


@triton.jit
def _tile(ptr, o_row, o_col, stride_c, m_tile, m_col):
    """[R, C] logits in fp32, minus infinity beyond the last class."""
    b = tl.load(ptr + o_row[:, None] + o_col[None, :] * stride_c, mask=m_tile, other=0.0)
    return tl.where(m_col[None, :], b.to(tl.float32), float("-inf"))


@triton.jit
def _rows_at(o_r, inner, stride_n, stride_p, INNER_ONE: tl.constexpr):
    """Offset of each row's first class: samples stride_n apart, pixels stride_p."""
    o = o_r.to(tl.int64)
    if INNER_ONE:
        return o * stride_n
    return (o // inner) * stride_n + (o % inner) * stride_p


@triton.jit
def _first_max(x, o_col, base):
    """Maximum over classes and the lowest class that has it, counted from `base`."""
    top = tl.max(x, 1)
    at = tl.min(tl.where(x == top[:, None], o_col[None, :], 1 << 30), 1)
    return top, at + base


@triton.jit
def forward_kernel(
    s_ptr, t0_ptr, t1_ptr, t2_ptr, t3_ptr, y_ptr, w_ptr, mask_ptr,
    kd_ptr, ce_ptr, agree_ptr, stats_ptr, partial_ptr, work_ptr,
    num_rows, num_classes, inner,
    s_n, s_p, s_c, t_n, t_p, t_c, y_n, y_p, y_c,
    temperature, smoothing, ignore_index, kd_weight, ce_weight, splits,
    TEACHERS: tl.constexpr, LABELS: tl.constexpr, WEIGHTS: tl.constexpr, MASK: tl.constexpr,
    SMOOTH: tl.constexpr, PER_ROW: tl.constexpr, INNER_ONE: tl.constexpr,
    ONE_TILE: tl.constexpr, PHASE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """PHASE 0: whole rows. 1: sums of one part of a row into work. 2: merge the parts, finish."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < num_rows
    o_c = tl.arange(0, BLOCK_C)
    o_s = _rows_at(o_r, inner, s_n, s_p, INNER_ONE)
    o_t = _rows_at(o_r, inner, t_n, t_p, INNER_ONE)
    o_y = _rows_at(o_r, inner, y_n, y_p, INNER_ONE)
    c_t = LOG2E / temperature

    # 1. Maxima and sums. Sums are kept per lane and reduced once, after the walk.
    ms = tl.full([BLOCK_R], float("-inf"), tl.float32)
    mt, mt1, mt2, mt3 = ms, ms, ms, ms
    at_s = tl.zeros([BLOCK_R], tl.int32)
    at_t = at_s
    zs = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    z1, zt, zt1, zt2, zt3, gap, mass, dot, flat = zs, zs, zs, zs, zs, zs, zs, zs, zs
    b_s, b_t = zs, zs
    first = 0
    last = num_classes
    if PHASE == 1:
        part = tl.cdiv(tl.cdiv(num_classes, splits), BLOCK_C) * BLOCK_C
        first = tl.program_id(1) * part
        last = tl.minimum(first + part, num_classes)
    if PHASE == 2:
        last = 0
    for base in range(first, last, BLOCK_C):
        o_col = base + o_c
        m_col = o_col < num_classes
        m_tile = m_r[:, None] & m_col[None, :]
        b_s = _tile(s_ptr, o_s, o_col, s_c, m_tile, m_col)
        if PER_ROW and TEACHERS > 0:
            top, at = _first_max(b_s, o_c, base)
            at_s = tl.where(top > ms, at, at_s)
        else:
            top = tl.max(b_s, 1)
        new = tl.maximum(ms, top)
        # The first block's old maximum is minus infinity: exp2(-inf) = 0 wipes nothing but zeros.
        fade = tl.exp2((ms - new) * c_t)
        fade1 = tl.exp2((ms - new) * LOG2E)
        ms = new
        x_s = b_s - ms[:, None]
        if TEACHERS > 0:
            zs = zs * fade[:, None] + tl.exp2(x_s * c_t)
            b_t = _tile(t0_ptr, o_t, o_col, t_c, m_tile, m_col)
            if PER_ROW and TEACHERS == 1:
                top, at = _first_max(b_t, o_c, base)
                at_t = tl.where(top > mt, at, at_t)
            else:
                top = tl.max(b_t, 1)
            new = tl.maximum(mt, top)
            fade = tl.exp2((mt - new) * c_t)
            mt = new
            e = tl.exp2((b_t - mt[:, None]) * c_t)
            zt = zt * fade[:, None] + e
            if TEACHERS == 1:
                gap = gap * fade[:, None] + tl.where(e > 0.0, e * (b_t - b_s), e)
        if TEACHERS > 1:
            b = _tile(t1_ptr, o_t, o_col, t_c, m_tile, m_col)
            new = tl.maximum(mt1, tl.max(b, 1))
            zt1 = zt1 * tl.exp2((mt1 - new) * c_t)[:, None] + tl.exp2((b - new[:, None]) * c_t)
            mt1 = new
        if TEACHERS > 2:
            b = _tile(t2_ptr, o_t, o_col, t_c, m_tile, m_col)
            new = tl.maximum(mt2, tl.max(b, 1))
            zt2 = zt2 * tl.exp2((mt2 - new) * c_t)[:, None] + tl.exp2((b - new[:, None]) * c_t)
            mt2 = new
        if TEACHERS > 3:
            b = _tile(t3_ptr, o_t, o_col, t_c, m_tile, m_col)
            new = tl.maximum(mt3, tl.max(b, 1))
            zt3 = zt3 * tl.exp2((mt3 - new) * c_t)[:, None] + tl.exp2((b - new[:, None]) * c_t)
            mt3 = new
        if LABELS > 0:
            z1 = z1 * fade1[:, None] + tl.exp2(x_s * LOG2E)
        if LABELS == 2:
            o_yc = o_y[:, None] + o_col[None, :] * y_c
            y = tl.load(y_ptr + o_yc, mask=m_tile, other=0.0).to(tl.float32)
            mass += y
            dot += tl.where(y != 0.0, y * b_s, 0.0)
        if SMOOTH:
            flat += tl.where(m_tile, b_s, 0.0)

    r_zs, r_z1, r_zt = tl.sum(zs, 1), tl.sum(z1, 1), tl.sum(zt, 1)
    r_gap, r_mass, r_dot, r_flat = tl.sum(gap, 1), tl.sum(mass, 1), tl.sum(dot, 1), tl.sum(flat, 1)
    if PHASE == 1:
        o_w = (o_r.to(tl.int64) * splits + tl.program_id(1)) * 11
        tl.store(work_ptr + o_w, ms, mask=m_r)
        tl.store(work_ptr + o_w + 1, r_zs, mask=m_r)
        tl.store(work_ptr + o_w + 2, r_z1, mask=m_r)
        tl.store(work_ptr + o_w + 3, mt, mask=m_r)
        tl.store(work_ptr + o_w + 4, r_zt, mask=m_r)
        tl.store(work_ptr + o_w + 5, r_gap, mask=m_r)
        tl.store(work_ptr + o_w + 6, r_mass, mask=m_r)
        tl.store(work_ptr + o_w + 7, r_dot, mask=m_r)
        tl.store(work_ptr + o_w + 8, r_flat, mask=m_r)
        tl.store(work_ptr + o_w + 9, at_s.to(tl.float32), mask=m_r)
        tl.store(work_ptr + o_w + 10, at_t.to(tl.float32), mask=m_r)
        return
    if PHASE == 2:
        o_k = tl.arange(0, SPLITS)
        m_k = m_r[:, None] & (o_k < splits)[None, :]
        o_w = (o_r.to(tl.int64)[:, None] * splits + o_k[None, :]) * 11
        p_ms = tl.load(work_ptr + o_w, mask=m_k, other=float("-inf"))
        p_mt = tl.load(work_ptr + o_w + 3, mask=m_k, other=float("-inf"))
        ms, mt = tl.max(p_ms, 1), tl.max(p_mt, 1)
        f_s = tl.exp2((p_ms - ms[:, None]) * c_t)
        f_t = tl.exp2((p_mt - mt[:, None]) * c_t)
        f_1 = tl.exp2((p_ms - ms[:, None]) * LOG2E)
        r_zs = tl.sum(f_s * tl.load(work_ptr + o_w + 1, mask=m_k, other=0.0), 1)
        r_z1 = tl.sum(f_1 * tl.load(work_ptr + o_w + 2, mask=m_k, other=0.0), 1)
        r_zt = tl.sum(f_t * tl.load(work_ptr + o_w + 4, mask=m_k, other=0.0), 1)
        r_gap = tl.sum(f_t * tl.load(work_ptr + o_w + 5, mask=m_k, other=0.0), 1)
        r_mass = tl.sum(tl.load(work_ptr + o_w + 6, mask=m_k, other=0.0), 1)
        r_dot = tl.sum(tl.load(work_ptr + o_w + 7, mask=m_k, other=0.0), 1)
        r_flat = tl.sum(tl.load(work_ptr + o_w + 8, mask=m_k, other=0.0), 1)
        p_at = tl.load(work_ptr + o_w + 9, mask=m_k, other=0.0)
        at_s = tl.min(tl.where(p_ms == ms[:, None], p_at, 1e9), 1).to(tl.int32)
        p_at = tl.load(work_ptr + o_w + 10, mask=m_k, other=0.0)
        at_t = tl.min(tl.where(p_mt == mt[:, None], p_at, 1e9), 1).to(tl.int32)
        last = num_classes

    # 2. KL. A second walk only where the plain difference would cancel, or for several teachers.
    l_s, l_1, l_t = tl.log2(r_zs), tl.log2(r_z1), tl.log2(r_zt)
    l_t1, l_t2, l_t3 = l_t, l_t, l_t
    kl = tl.zeros([BLOCK_R], tl.float32)
    walk = False
    if TEACHERS == 1:
        kl = (r_gap / r_zt + (ms - mt)) / temperature - (l_t - l_s) * LN2
        low = m_r & (kl < NEAR_EQUAL)
        walk = tl.max(low.to(tl.int32), 0) > 0
    if TEACHERS > 1:
        l_t1 = tl.log2(tl.sum(zt1, 1))
        l_t2 = tl.log2(tl.sum(zt2, 1))
        l_t3 = tl.log2(tl.sum(zt3, 1))
        low = m_r
        walk = True
    if TEACHERS > 0:
        if walk:
            acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
            best = tl.full([BLOCK_R], -1.0, tl.float32)
            for base in range(0, last, BLOCK_C):
                o_col = base + o_c
                m_col = o_col < num_classes
                m_tile = m_r[:, None] & m_col[None, :]
                if not ONE_TILE:
                    b_s = _tile(s_ptr, o_s, o_col, s_c, m_tile, m_col)
                    b_t = _tile(t0_ptr, o_t, o_col, t_c, m_tile, m_col)
                x_s = tl.fma(b_s - ms[:, None], c_t, -l_s[:, None])
                x_t = tl.fma(b_t - mt[:, None], c_t, -l_t[:, None])
                q = tl.exp2(x_s)
                p = tl.exp2(x_t)
                if TEACHERS == 1:
                    u = (x_t - x_s) * LN2
                if TEACHERS > 1:
                    b = _tile(t1_ptr, o_t, o_col, t_c, m_tile, m_col)
                    p += tl.exp2(tl.fma(b - mt1[:, None], c_t, -l_t1[:, None]))
                    if TEACHERS > 2:
                        b = _tile(t2_ptr, o_t, o_col, t_c, m_tile, m_col)
                        p += tl.exp2(tl.fma(b - mt2[:, None], c_t, -l_t2[:, None]))
                    if TEACHERS > 3:
                        b = _tile(t3_ptr, o_t, o_col, t_c, m_tile, m_col)
                        p += tl.exp2(tl.fma(b - mt3[:, None], c_t, -l_t3[:, None]))
                    p = p * (1.0 / TEACHERS)
                    u = (tl.log2(p) - x_s) * LN2
                    if PER_ROW:
                        top, at = _first_max(p, o_c, base)
                        at_t = tl.where(top > best, at, at_t)
                        best = tl.maximum(best, top)
                # Where p is 0, u may be no number.
                u = tl.where(p > 0.0, u, 0.0)
                acc += tl.where(m_tile, _kl_term(p, q, u), 0.0)
            kl = tl.where(low, tl.sum(acc, 1), kl)

    # 3. Cross entropy, weights, and what the row leaves behind.
    counts = m_r
    if MASK:
        counts = counts & (tl.load(mask_ptr + o_r, mask=m_r, other=0) != 0)
    ce = tl.zeros([BLOCK_R], tl.float32)
    if LABELS > 0:
        r_mass_y = r_mass
        r_dot_y = r_dot
        if LABELS == 1:
            y = tl.load(y_ptr + o_r, mask=m_r, other=0)
            counts = counts & (y != ignore_index)
            known = counts & (y >= 0) & (y < num_classes)
            b = tl.load(s_ptr + o_s + y * s_c, mask=known, other=float("nan"))
            r_dot_y = b.to(tl.float32)
            r_mass_y = tl.full([BLOCK_R], 1.0, tl.float32)
        if SMOOTH:
            r_dot_y = (1.0 - smoothing) * r_dot_y + (smoothing / num_classes) * r_flat
            r_mass_y = (1.0 - smoothing) * r_mass_y + smoothing
        ce = r_mass_y * (l_1 * LN2) - (r_dot_y - r_mass_y * ms)
    weight = tl.full([BLOCK_R], 1.0, tl.float32)
    if WEIGHTS:
        weight = tl.load(w_ptr + o_r, mask=m_r, other=0.0).to(tl.float32)
    kd = tl.where(counts, weight * (temperature * temperature) * kl, 0.0)
    ce = tl.where(counts, weight * ce, 0.0)
    if PER_ROW:
        tl.store(kd_ptr + o_r, kd, mask=m_r)
        tl.store(ce_ptr + o_r, ce, mask=m_r)
        same = counts & (at_s == at_t) & (TEACHERS > 0)
        tl.store(agree_ptr + o_r, same.to(tl.float32), mask=m_r)
    else:
        o_p = tl.program_id(0) * 2
        tl.store(partial_ptr + o_p, tl.sum(kd_weight * kd + ce_weight * ce, 0))
        tl.store(partial_ptr + o_p + 1, tl.sum(counts.to(tl.float32), 0))
    o_x = o_r.to(tl.int64) * (3 + 2 * TEACHERS)
    tl.store(stats_ptr + o_x, ms, mask=m_r)
    tl.store(stats_ptr + o_x + 1, l_s, mask=m_r)
    tl.store(stats_ptr + o_x + 2, l_1, mask=m_r)
    if TEACHERS > 0:
        tl.store(stats_ptr + o_x + 3, mt, mask=m_r)
        tl.store(stats_ptr + o_x + 4, l_t, mask=m_r)
    if TEACHERS > 1:
        tl.store(stats_ptr + o_x + 5, mt1, mask=m_r)
        tl.store(stats_ptr + o_x + 6, l_t1, mask=m_r)
    if TEACHERS > 2:
        tl.store(stats_ptr + o_x + 7, mt2, mask=m_r)
        tl.store(stats_ptr + o_x + 8, l_t2, mask=m_r)
    if TEACHERS > 3:
        tl.store(stats_ptr + o_x + 9, mt3, mask=m_r)
        tl.store(stats_ptr + o_x + 10, l_t3, mask=m_r)


@triton.jit
def reduce_kernel(partial_ptr, loss_ptr, divisor_ptr, num_partials, BLOCK: tl.constexpr):
    """One program: the mean from the partial sums, always added in the same order."""
    o = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for base in range(0, num_partials, BLOCK):
        m = base + o < num_partials
        total += tl.load(partial_ptr + (base + o) * 2, mask=m, other=0.0)
        count += tl.load(partial_ptr + (base + o) * 2 + 1, mask=m, other=0.0)
    divisor = tl.maximum(tl.sum(count, 0), 1.0)
    tl.store(loss_ptr, tl.sum(total, 0) / divisor)
    tl.store(divisor_ptr, divisor)


@triton.jit
def gradient_kernel(
    s_ptr, t0_ptr, t1_ptr, t2_ptr, t3_ptr, y_ptr, w_ptr, mask_ptr, g_ptr, stats_ptr,
    up_kd_ptr, up_ce_ptr, divisor_ptr,
    num_rows, num_classes, inner,
    s_n, s_p, s_c, t_n, t_p, t_c, y_n, y_p, y_c, g_n, g_p, g_c,
    temperature, smoothing, ignore_index, kd_scale, ce_scale, up_kd_step, up_ce_step,
    TEACHERS: tl.constexpr, LABELS: tl.constexpr, WEIGHTS: tl.constexpr, MASK: tl.constexpr,
    SMOOTH: tl.constexpr, DIVISOR: tl.constexpr, INNER_ONE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of a * (p_s - p_t) + b * (sum(y) p_1 - y). TEACHERS or LABELS 0 drop a part."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_r = o_r < num_rows
    m_col = o_col < num_classes
    m_tile = m_r[:, None] & m_col[None, :]
    o_s = _rows_at(o_r, inner, s_n, s_p, INNER_ONE)
    c_t = LOG2E / temperature
    counts = m_r
    if MASK:
        counts = counts & (tl.load(mask_ptr + o_r, mask=m_r, other=0) != 0)
    weight = tl.full([BLOCK_R], 1.0, tl.float32)
    if WEIGHTS:
        weight = tl.load(w_ptr + o_r, mask=m_r, other=0.0).to(tl.float32)
    if DIVISOR:
        weight = weight / tl.load(divisor_ptr)
    NUM_TEACHERS: tl.constexpr = TEACHERS if TEACHERS > 0 else -TEACHERS
    o_x = o_r.to(tl.int64) * (3 + 2 * NUM_TEACHERS)
    b_s = _tile(s_ptr, o_s, o_col, s_c, m_tile, m_col)
    ms = tl.load(stats_ptr + o_x, mask=m_r, other=0.0)
    x_s = b_s - ms[:, None]
    grad = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if TEACHERS > 0:
        o_t = _rows_at(o_r, inner, t_n, t_p, INNER_ONE)
        l_s = tl.load(stats_ptr + o_x + 1, mask=m_r, other=0.0)
        mt = tl.load(stats_ptr + o_x + 3, mask=m_r, other=0.0)
        l_t = tl.load(stats_ptr + o_x + 4, mask=m_r, other=0.0)
        b_t = _tile(t0_ptr, o_t, o_col, t_c, m_tile, m_col)
        # No product to contract: for equal logits the two are equal bits and leave exactly 0.
        p_s = tl.exp2(tl.fma(x_s, c_t, -l_s[:, None]))
        p_t = tl.exp2(tl.fma(b_t - mt[:, None], c_t, -l_t[:, None]))
        if TEACHERS > 1:
            mt = tl.load(stats_ptr + o_x + 5, mask=m_r, other=0.0)
            l_t = tl.load(stats_ptr + o_x + 6, mask=m_r, other=0.0)
            b_t = _tile(t1_ptr, o_t, o_col, t_c, m_tile, m_col)
            p_t += tl.exp2(tl.fma(b_t - mt[:, None], c_t, -l_t[:, None]))
        if TEACHERS > 2:
            mt = tl.load(stats_ptr + o_x + 7, mask=m_r, other=0.0)
            l_t = tl.load(stats_ptr + o_x + 8, mask=m_r, other=0.0)
            b_t = _tile(t2_ptr, o_t, o_col, t_c, m_tile, m_col)
            p_t += tl.exp2(tl.fma(b_t - mt[:, None], c_t, -l_t[:, None]))
        if TEACHERS > 3:
            mt = tl.load(stats_ptr + o_x + 9, mask=m_r, other=0.0)
            l_t = tl.load(stats_ptr + o_x + 10, mask=m_r, other=0.0)
            b_t = _tile(t3_ptr, o_t, o_col, t_c, m_tile, m_col)
            p_t += tl.exp2(tl.fma(b_t - mt[:, None], c_t, -l_t[:, None]))
        if TEACHERS > 1:
            p_t = p_t * (1.0 / TEACHERS)
        up = tl.load(up_kd_ptr + o_r * up_kd_step, mask=m_r, other=0.0).to(tl.float32)
        a = up * weight * (kd_scale * temperature)
        grad = a[:, None] * (p_s - p_t)
    if LABELS > 0:
        l_1 = tl.load(stats_ptr + o_x + 2, mask=m_r, other=0.0)
        p_1 = tl.exp2(tl.fma(x_s, LOG2E, -l_1[:, None]))
        up = tl.load(up_ce_ptr + o_r * up_ce_step, mask=m_r, other=0.0).to(tl.float32)
        b = up * weight * ce_scale
        if LABELS == 1:
            y = tl.load(y_ptr + o_r, mask=m_r, other=0)
            counts = counts & (y != ignore_index)
            hit = tl.where(o_col[None, :] == y[:, None], 1.0 - smoothing, 0.0)
            target = hit + smoothing / num_classes if SMOOTH else hit
            grad += b[:, None] * (p_1 - target)
        else:
            o_y = _rows_at(o_r, inner, y_n, y_p, INNER_ONE)
            o_yc = o_y[:, None] + o_col[None, :] * y_c
            target = tl.load(y_ptr + o_yc, mask=m_tile, other=0.0).to(tl.float32)
            # The target's mass lies behind the statistics: one sum over its whole row.
            mass = tl.load(stats_ptr + num_rows.to(tl.int64) * (3 + 2 * NUM_TEACHERS) + o_r, mask=m_r)
            if SMOOTH:
                target = (1.0 - smoothing) * target + smoothing / num_classes
                mass = (1.0 - smoothing) * mass + smoothing
            grad += b[:, None] * (mass[:, None] * p_1 - target)
    elif LABELS < 0:
        y = tl.load(y_ptr + o_r, mask=m_r, other=0)
        counts = counts & (y != ignore_index)
    # A row that does not count gets 0 even where its logits are no numbers.
    grad = tl.where(counts[:, None], grad, 0.0)
    o_g = _rows_at(o_r, inner, g_n, g_p, INNER_ONE)
    tl.store(g_ptr + o_g[:, None] + o_col[None, :] * g_c, grad.to(g_ptr.dtype.element_ty), mask=m_tile)
