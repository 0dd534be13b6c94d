"""A grouped 3x3 and a pointwise convolution in one Triton kernel; gpu.py launches it."""

import triton
import triton.language as tl

from fastkd.kernels.grouped_pointwise.gpu_kernels import nine_weights, slide_row
from fastkd.kernels.grouped_pointwise.gpu_pointwise import behind
from fastkd.kernels.grouped_pointwise.gpu_values import activated, affine, of_norm, store_moments

__all__ = ["pair_kernel"]


@triton.jit
def pair_kernel(
    x_ptr,  # [num, height, width, C]
    weight_ptr,  # [C, CPG, 3, 3]
    bias_ptr,  # [C] or None
    norm1,  # between the convolutions
    eps1,
    weight1_ptr,  # [CO, C]
    bias1_ptr,  # [CO] or None
    norm2,  # of the result, or None
    eps2,
    residual_ptr,  # of y's shape, or None
    y_ptr,  # [num, out_height, out_width, CO]
    partial_ptr,  # [programs, 3, CO] or None
    num,
    height,
    width,
    out_height,
    out_width,
    stride,  # 1 with more than one row
    padding,
    dilation,
    ACT1: tl.constexpr,
    ACT2: tl.constexpr,
    C: tl.constexpr,
    CO: tl.constexpr,
    CPG: tl.constexpr,
    SET: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,  # 1 or 2
):
    """All channels of the result at BLOCK_P columns of ROWS rows, as in slide_kernel.

    What the grouped convolution gives is rounded to x's dtype, as if it were stored.
    """
    program = tl.program_id(0)
    chunks = dilation * tl.cdiv(tl.cdiv(out_height, dilation), ROWS)
    chunk = program % chunks
    row = chunk % dilation + chunk // dilation * (ROWS * dilation)
    o_p = program // chunks * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < num * out_width
    image = (o_p // out_width).to(tl.int64)
    column = o_p % out_width
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < CO
    like: tl.constexpr = x_ptr.dtype.element_ty
    b_z0 = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    b_z1 = b_z0
    for begin in range(0, C, SET):
        o_c = tl.arange(0, BLOCK_C)
        m_c = (o_c < SET) & (begin + o_c < C)
        o_c = begin + o_c
        weights = nine_weights(weight_ptr, o_c, m_c, like, CPG, False)
        if bias_ptr is not None:
            b_bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_mean, _, b_scale, b_shift = of_norm(norm1, eps1, o_c, m_c)
        o_w = o_c[:, None] + (o_n * C)[None, :]
        b_w = tl.load(weight1_ptr + o_w, mask=m_c[:, None] & m_n[None, :], other=0.0).to(like)
        p_x = x_ptr + (image * (height * width * C))[:, None] + o_c[None, :]
        b_first = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        b_second, b_third = b_first, b_first
        for i in tl.static_range(ROWS + 2):
            o_row = row * stride - padding + i * dilation
            b_first, b_second, b_third = slide_row(
                p_x + o_row * (width * C),
                m_p & (o_row >= 0) & (o_row < height),
                m_c,
                column * stride - padding,
                width,
                dilation,
                weights,
                b_first,
                b_second,
                b_third,
                i,
                ROWS,
                C,
                PRECISION,
            )
            if i >= 2:
                b = b_third
                if bias_ptr is not None:
                    b += b_bias[None, :]
                b = b.to(like).to(tl.float32)
                b = activated(affine(b, b_mean, b_scale, b_shift, norm1), ACT1).to(like)
                if i == 2:
                    b_z0 = tl.dot(b, b_w, b_z0, input_precision=PRECISION)
                else:
                    b_z1 = tl.dot(b, b_w, b_z1, input_precision=PRECISION)
            b_third, b_second = b_second, b_first
            b_first = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    columns = tl.sum(m_p.to(tl.float32), axis=0)
    count = columns * 0.0
    b_pivot = tl.zeros([BLOCK_N], tl.float32)
    b_sum, b_square = b_pivot, b_pivot
    for j in tl.static_range(ROWS):
        o_out = row + j * dilation
        mask = (m_p & (o_out < out_height))[:, None] & m_n[None, :]
        o_y = image * (out_height * out_width * CO) + (o_out * out_width + column) * CO
        o_y = o_y[:, None] + o_n[None, :]
        b = b_z0 if j == 0 else b_z1
        if bias1_ptr is not None:
            b += tl.load(bias1_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        b = behind(b, norm2, eps2, residual_ptr, o_y, mask, o_n, m_n, ACT2).to(like)
        tl.store(y_ptr + o_y, b, mask=mask)
        if partial_ptr is not None:
            b = tl.where(mask, b.to(tl.float32), 0.0)
            rows = tl.where(o_out < out_height, columns, 0.0)
            if j == 0:
                b_pivot = tl.sum(b, axis=0) / tl.maximum(rows, 1.0)
            count += rows
            b = tl.where(mask, b - b_pivot[None, :], 0.0)
            b_sum += tl.sum(b, axis=0)
            b_square += tl.sum(b * b, axis=0)
    if partial_ptr is not None:
        store_moments(partial_ptr, program, o_n, m_n, count, b_pivot, b_sum, b_square, CO)
