"""Pointwise convolutions as Triton kernels, and their data gradient; gpu.py launches them.

Activations are matrices [pixels, C]. Programs are few and walk over many blocks of pixels, with the
weights in registers where they fit; sums over pixels stay in the threads that find them
(`column_sums`) until a program ends.
"""

import triton
import triton.language as tl

from fastkd.kernels.grouped_pointwise.gpu_values import (
    activated,
    affine,
    column_sums,
    derivative,
    of_after,
    of_norm,
    passed,
    store_moments,
    store_sums,
)

__all__ = ["pointwise_backward_kernel", "pointwise_kernel"]


@triton.jit
def _weights(weight_ptr, o_k, m_k, o_n, m_n, like, k_step, n_step):
    """[K, N] weights; those beyond the last channel are 0."""
    o_w = (o_k * k_step)[:, None] + (o_n * n_step)[None, :]
    return tl.load(weight_ptr + o_w, mask=m_k[:, None] & m_n[None, :], other=0.0).to(like)


@triton.jit
def pointwise_kernel(
    x_ptr,  # [pixels, C]
    norm,
    eps,
    weight_ptr,  # [CO, C]
    bias_ptr,  # [CO] or None
    norm2,  # of the result, or None
    eps2,
    residual_ptr,  # [pixels, CO] or None
    y_ptr,  # [pixels, CO]
    partial_ptr,  # [programs, 3, CO] or None
    pixels,
    programs,
    ACT: tl.constexpr,
    ACT2: tl.constexpr,
    C: tl.constexpr,
    CO: tl.constexpr,
    PRECISION: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """act2(norm2(act(norm(x)) weight + bias)) + residual, BLOCK_N channels of it, and moments."""
    tiles: tl.constexpr = (CO + BLOCK_N - 1) // BLOCK_N
    like: tl.constexpr = x_ptr.dtype.element_ty
    program = (tl.program_id(0) // tiles).to(tl.int64)
    o_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < CO
    o_k = tl.arange(0, BLOCK_K)
    if C <= BLOCK_K:
        b_w = _weights(weight_ptr, o_k, o_k < C, o_n, m_n, like, 1, C)
        b_mean, _, b_scale, b_shift = of_norm(norm, eps, o_k, o_k < C)
    b_pivot = tl.zeros([BLOCK_N], tl.float32)
    b_sum = tl.zeros([WARPS * 8, BLOCK_N], tl.float32)
    b_square = b_sum
    count = tl.sum(b_pivot, axis=0)
    for block in range(program, tl.cdiv(pixels, BLOCK_P), programs):
        start = block * BLOCK_P
        m_p = tl.arange(0, BLOCK_P) < pixels - start
        o_p = start + tl.arange(0, BLOCK_P)
        b = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        for begin in range(0, C, BLOCK_K):
            o_k = begin + tl.arange(0, BLOCK_K)
            m_k = o_k < C
            if C > BLOCK_K:
                b_w = _weights(weight_ptr, o_k, m_k, o_n, m_n, like, 1, C)
                b_mean, _, b_scale, b_shift = of_norm(norm, eps, o_k, m_k)
            p_x = x_ptr + (o_p * C)[:, None] + o_k[None, :]
            b_x = tl.load(p_x, mask=m_p[:, None] & m_k[None, :], other=0.0)
            if norm is not None or ACT != 0:
                b_x = affine(b_x.to(tl.float32), b_mean, b_scale, b_shift, norm)
                b_x = activated(b_x, ACT).to(like)
            b = tl.dot(b_x, b_w, b, input_precision=PRECISION)
        mask = m_p[:, None] & m_n[None, :]
        o_y = (o_p * CO)[:, None] + o_n[None, :]
        if bias_ptr is not None:
            b += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        b = behind(b, norm2, eps2, residual_ptr, o_y, mask, o_n, m_n, ACT2).to(like)
        tl.store(y_ptr + o_y, b, mask=mask)
        if partial_ptr is not None:
            b = tl.where(mask, b.to(tl.float32), 0.0)
            rows = tl.minimum(pixels - start, BLOCK_P).to(tl.float32)
            if block == program:
                b_pivot = tl.sum(b, axis=0) / rows
            count += rows
            b = tl.where(mask, b - b_pivot[None, :], 0.0)
            b_sum += column_sums(b, WARPS)
            b_square += column_sums(b * b, WARPS)
    if partial_ptr is not None:
        b_sum, b_square = tl.sum(b_sum, axis=0), tl.sum(b_square, axis=0)
        store_moments(partial_ptr, program, o_n, m_n, count, b_pivot, b_sum, b_square, CO)


@triton.jit
def behind(b, norm2, eps2, residual_ptr, o_y, mask, o_n, m_n, ACT2: tl.constexpr):
    """act2(norm2(b)) + residual of a tile [P, N] in fp32."""
    b_mean, _, b_scale, b_shift = of_norm(norm2, eps2, o_n, m_n)
    b = activated(affine(b, b_mean, b_scale, b_shift, norm2), ACT2)
    if residual_ptr is not None:
        b += tl.load(residual_ptr + o_y, mask=mask, other=0.0).to(tl.float32)
    return b


@triton.jit
def pointwise_backward_kernel(
    g_ptr,  # [pixels, CO], the gradient at the output, or what `after` makes it
    after,
    after_eps,
    dz_ptr,  # where the gradient at the output is stored, or None
    x_ptr,  # [pixels, C]
    norm,  # in front of the convolution
    eps,
    weight_ptr,  # [CO, C]
    y_ptr,  # [pixels, C], the gradient behind the norm
    partial_ptr,  # [programs, 2, C] sums, or None
    dw_ptr,  # [programs, CO, C] fp32, or None
    db_ptr,  # [programs, CO] fp32, or None
    pixels,
    programs,
    ACT: tl.constexpr,
    C: tl.constexpr,
    CO: tl.constexpr,
    PRECISION: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,  # channels of g
    BLOCK_N: tl.constexpr,  # channels of x
):
    """The gradient of BLOCK_N input channels, and where one tile holds all weights, of these."""
    tiles: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    like: tl.constexpr = x_ptr.dtype.element_ty
    tile = tl.program_id(0) % tiles
    program = (tl.program_id(0) // tiles).to(tl.int64)
    o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    o_k = tl.arange(0, BLOCK_K)
    if CO <= BLOCK_K:
        b_w = _weights(weight_ptr, o_k, o_k < CO, o_n, m_n, like, C, 1)
    b_dw = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    b_db = tl.zeros([WARPS * 8, BLOCK_K], tl.float32)
    b_sum = tl.zeros([WARPS * 8, BLOCK_N], tl.float32)
    b_dot = b_sum
    for block in range(program, tl.cdiv(pixels, BLOCK_P), programs):
        start = block * BLOCK_P
        m_p = tl.arange(0, BLOCK_P) < pixels - start
        o_p = start + tl.arange(0, BLOCK_P)
        b = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        b_g = tl.zeros([BLOCK_P, BLOCK_K], like)
        for begin in range(0, CO, BLOCK_K):
            o_k = begin + tl.arange(0, BLOCK_K)
            m_k = o_k < CO
            if CO > BLOCK_K:
                b_w = _weights(weight_ptr, o_k, m_k, o_n, m_n, like, C, 1)
            o_z = (o_p * CO)[:, None] + o_k[None, :]
            mask = m_p[:, None] & m_k[None, :]
            b_g = tl.load(g_ptr + o_z, mask=mask, other=0.0)
            if after is not None:
                b_mean, b_mean_g, b_slope, b_scale = of_after(after, after_eps, o_k, m_k, CO)
                b_out = tl.load(after[0] + o_z, mask=mask, other=0.0).to(tl.float32)
                b_g = derivative(b_g.to(tl.float32), b_out, b_mean, b_mean_g, b_slope, b_scale)
                b_g = tl.where(mask, b_g, 0.0).to(like)
            if dz_ptr is not None:
                tl.store(dz_ptr + o_z, b_g, mask=mask & (tile == 0))
            b = tl.dot(b_g, b_w, b, input_precision=PRECISION)
        mask = m_p[:, None] & m_n[None, :]
        o_y = (o_p * C)[:, None] + o_n[None, :]
        if norm is not None or ACT != 0 or dw_ptr is not None:
            b_x = tl.load(x_ptr + o_y, mask=mask, other=0.0)
            b_mean, b_rstd, b_scale, b_shift = of_norm(norm, eps, o_n, m_n)
            b_v = affine(b_x.to(tl.float32), b_mean, b_scale, b_shift, norm)
            b = passed(b, b_v, ACT)
        b = b.to(like)
        tl.store(y_ptr + o_y, b, mask=mask)
        if partial_ptr is not None:
            b = tl.where(mask, b.to(tl.float32), 0.0)
            b_sum += column_sums(b, WARPS)
            b = b * ((b_x.to(tl.float32) - b_mean[None, :]) * b_rstd[None, :])
            b_dot += column_sums(b, WARPS)
        if dw_ptr is not None:
            b_x = activated(b_v, ACT).to(like)
            b_dw = tl.dot(tl.trans(b_g), b_x, b_dw, input_precision=PRECISION)
        if db_ptr is not None:
            b_db += column_sums(b_g.to(tl.float32), WARPS)
    if partial_ptr is not None:
        b_sum, b_dot = tl.sum(b_sum, axis=0), tl.sum(b_dot, axis=0)
        store_sums(partial_ptr, program, o_n, m_n, b_sum, b_dot, C)
    if dw_ptr is not None:
        p = dw_ptr + program * (CO * C) + (o_k * C)[:, None] + o_n[None, :]
        tl.store(p, b_dw, mask=(o_k < CO)[:, None] & m_n[None, :])
    if db_ptr is not None:
        tl.store(db_ptr + program * CO + o_k, tl.sum(b_db, axis=0), mask=o_k < CO)
