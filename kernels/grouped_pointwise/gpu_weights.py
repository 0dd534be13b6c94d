"""The weight gradients of `grouped_pointwise` as Triton kernels; gpu.py launches them.

A program sums over a share of the pixels and writes its part; `reduce_kernel` adds the parts in
their order, so results repeat bit for bit.
"""

import triton
import triton.language as tl

from fastkd.kernels.grouped_pointwise.gpu_values import (
    activated,
    affine,
    derivative,
    of_after,
    of_norm,
)

__all__ = ["grouped_weight_kernel", "pointwise_weight_kernel", "reduce_kernel"]


@triton.jit
def _tap(x_ptr, o_image, o_h, o_w, m_p, o_k, m_k, height, width, KH, KW, DILATION, C: tl.constexpr):
    """[P, K] inputs that the tap (KH, KW) reads."""
    o_h = o_h + KH * DILATION
    o_w = o_w + KW * DILATION
    m = m_p & (o_h >= 0) & (o_h < height) & (o_w >= 0) & (o_w < width)
    o_x = (o_image + (o_h * width + o_w) * C)[:, None] + o_k[None, :]
    return tl.load(x_ptr + o_x, mask=m[:, None] & m_k[None, :], other=0.0)


@triton.jit
def grouped_weight_kernel(
    g_ptr,  # [num, out_height, out_width, C], the gradient at the output, or what `after` makes it
    after,
    after_eps,
    dy_ptr,  # where the gradient at the output is stored, or None
    x_ptr,  # [num, height, width, C]
    weight_ptr,  # [programs, C, CPG, 3, 3] fp32
    bias_ptr,  # [programs, C] fp32 or None
    num,
    height,
    width,
    out_height,
    out_width,
    stride,
    padding,
    dilation,
    share,  # positions of a program, a multiple of BLOCK_P
    C: tl.constexpr,
    CPG: tl.constexpr,
    SET: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Nine products [N, P] x [P, K] per block of positions, of one tile of outputs and inputs."""
    PARTS: tl.constexpr = (SET + BLOCK_C - 1) // BLOCK_C
    tiles: tl.constexpr = (C + SET - 1) // SET * PARTS * PARTS
    tile = tl.program_id(0) % tiles
    program = tl.program_id(0) // tiles
    first = tile // (PARTS * PARTS) * SET
    o_n = tile // PARTS % PARTS * BLOCK_C + tl.arange(0, BLOCK_C)
    o_k = tile % PARTS * BLOCK_C + tl.arange(0, BLOCK_C)
    m_n, m_k = (o_n < SET) & (first + o_n < C), (o_k < SET) & (first + o_k < C)
    o_n, o_k = first + o_n, first + o_k
    like: tl.constexpr = x_ptr.dtype.element_ty
    w0 = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    w1, w2, w3, w4, w5, w6, w7, w8 = w0, w0, w0, w0, w0, w0, w0, w0
    b_bias = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    positions = num * out_height * out_width
    begin = program * share
    for start in range(begin, tl.minimum(begin + share, positions), BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        m_p = o_p < positions
        mask = m_p[:, None] & m_n[None, :]
        o_y = (o_p.to(tl.int64) * C)[:, None] + o_n[None, :]
        b = tl.load(g_ptr + o_y, mask=mask, other=0.0)
        if after is not None:
            # The vectors are loaded here: kept over the loop they would cost registers.
            b_mean, b_mean_g, b_slope, b_scale = of_after(after, after_eps, o_n, m_n, C)
            b_out = tl.load(after[0] + o_y, mask=mask, other=0.0).to(tl.float32)
            b = derivative(b.to(tl.float32), b_out, b_mean, b_mean_g, b_slope, b_scale)
            b = tl.where(mask, b, 0.0).to(like)
        if dy_ptr is not None:
            tl.store(dy_ptr + o_y, b, mask=mask)
        if bias_ptr is not None:
            b_bias += b.to(tl.float32)
        b = tl.trans(b)
        image = (o_p // (out_height * out_width)).to(tl.int64) * (height * width * C)
        o_h = o_p // out_width % out_height * stride - padding
        o_w = o_p % out_width * stride - padding
        t = _tap(x_ptr, image, o_h, o_w, m_p, o_k, m_k, height, width, 0, 0, dilation, C)
        w0 = tl.dot(b, t, w0, input_precision=PRECISION)
        t = _tap(x_ptr, image, o_h, o_w, m_p, o_k, m_k, height, width, 0, 1, dilation, C)
        w1 = tl.dot(b, t, w1, input_precision=PRECISION)
        t = _tap(x_ptr, image, o_h, o_w, m_p, o_k, m_k, height, width, 0, 2, dilation, C)
        w2 = tl.dot(b, t, w2, input_precision=PRECISION)
        t = _tap(x_ptr, image, o_h, o_w, m_p, o_k, m_k, height, width, 1, 0, dilation, C)
        w3 = tl.dot(b, t, w3, input_precision=PRECISION)
        t = _tap(x_ptr, image, o_h, o_w, m_p, o_k, m_k, height, width, 1, 1, dilation, C)
        w4 = tl.dot(b, t, w4, input_precision=PRECISION)
        t = _tap(x_ptr, image, o_h, o_w, m_p, o_k, m_k, height, width, 1, 2, dilation, C)
        w5 = tl.dot(b, t, w5, input_precision=PRECISION)
        t = _tap(x_ptr, image, o_h, o_w, m_p, o_k, m_k, height, width, 2, 0, dilation, C)
        w6 = tl.dot(b, t, w6, input_precision=PRECISION)
        t = _tap(x_ptr, image, o_h, o_w, m_p, o_k, m_k, height, width, 2, 1, dilation, C)
        w7 = tl.dot(b, t, w7, input_precision=PRECISION)
        t = _tap(x_ptr, image, o_h, o_w, m_p, o_k, m_k, height, width, 2, 2, dilation, C)
        w8 = tl.dot(b, t, w8, input_precision=PRECISION)
    # Products between groups are not stored.
    mask = (o_n // CPG)[:, None] == (o_k // CPG)[None, :]
    mask = mask & m_n[:, None] & m_k[None, :]
    p = weight_ptr + program.to(tl.int64) * (C * CPG * 9)
    p = p + ((o_n * CPG)[:, None] + (o_k % CPG)[None, :]) * 9
    tl.store(p, w0, mask=mask)
    tl.store(p + 1, w1, mask=mask)
    tl.store(p + 2, w2, mask=mask)
    tl.store(p + 3, w3, mask=mask)
    tl.store(p + 4, w4, mask=mask)
    tl.store(p + 5, w5, mask=mask)
    tl.store(p + 6, w6, mask=mask)
    tl.store(p + 7, w7, mask=mask)
    tl.store(p + 8, w8, mask=mask)
    if bias_ptr is not None:
        # Every tile of inputs would give the same sums: the first one's are stored.
        m_n = m_n & (tile % PARTS == 0)
        tl.store(bias_ptr + program * C + o_n, tl.sum(b_bias, axis=0), mask=m_n)


@triton.jit
def pointwise_weight_kernel(
    g_ptr,  # [pixels, CO], the gradient at the output
    x_ptr,  # [pixels, C]
    norm,  # in front of the convolution
    eps,
    weight_ptr,  # [programs, CO, C] fp32
    bias_ptr,  # [programs, CO] fp32 or None
    pixels,
    share,  # pixels of a program, a multiple of BLOCK_P
    ACT: tl.constexpr,
    C: tl.constexpr,
    CO: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,  # channels of g
    BLOCK_N: tl.constexpr,  # channels of x
):
    """One product [K, P] x [P, N] per block of pixels."""
    parts: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tiles: tl.constexpr = (CO + BLOCK_K - 1) // BLOCK_K * parts
    tile = tl.program_id(0) % tiles
    program = (tl.program_id(0) // tiles).to(tl.int64)
    o_k = tile // parts * BLOCK_K + tl.arange(0, BLOCK_K)
    o_n = tile % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    m_k, m_n = o_k < CO, o_n < C
    like: tl.constexpr = x_ptr.dtype.element_ty
    b_w = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    b_bias = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    b_mean, _, b_scale, b_shift = of_norm(norm, eps, o_n, m_n)
    begin = program * share
    for start in range(begin, tl.minimum(begin + share, pixels), BLOCK_P):
        m_p = tl.arange(0, BLOCK_P) < pixels - start
        o_p = start + tl.arange(0, BLOCK_P)
        mask = m_p[:, None] & m_k[None, :]
        b_g = tl.load(g_ptr + (o_p * CO)[:, None] + o_k[None, :], mask=mask, other=0.0)
        mask = m_p[:, None] & m_n[None, :]
        b_x = tl.load(x_ptr + (o_p * C)[:, None] + o_n[None, :], mask=mask, other=0.0)
        if norm is not None or ACT != 0:
            b_x = affine(b_x.to(tl.float32), b_mean, b_scale, b_shift, norm)
            # Rows behind the last pixel need no mask: there g is 0.
            b_x = activated(b_x, ACT).to(like)
        if bias_ptr is not None:
            b_bias += b_g.to(tl.float32)
        b_w = tl.dot(tl.trans(b_g), b_x, b_w, input_precision=PRECISION)
    p = weight_ptr + program * (CO * C) + (o_k * C)[:, None] + o_n[None, :]
    tl.store(p, b_w, mask=m_k[:, None] & m_n[None, :])
    if bias_ptr is not None:
        m_k = m_k & (tile % parts == 0)
        tl.store(bias_ptr + program * CO + o_k, tl.sum(b_bias, axis=0), mask=m_k)


@triton.jit
def reduce_kernel(
    parts_ptr,  # [parts, length] fp32
    out_ptr,  # [length] fp32
    parts,
    length,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = sum over the parts, always in the same order."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < length
    b = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(0, parts, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        mask = (o_p < parts)[:, None] & m_n[None, :]
        b += tl.load(
            parts_ptr + (o_p.to(tl.int64) * length)[:, None] + o_n[None, :], mask=mask, other=0.0
        )
    tl.store(out_ptr + o_n, tl.sum(b, axis=0), mask=m_n)
