"""Batch norms that no convolution takes along, as Triton kernels; gpu.py launches them.

All see activations as a matrix [pixels, C] and walk BLOCK_P pixels of BLOCK_N channels at a time.
"""

import triton
import triton.language as tl

from fastkd.kernels.grouped_pointwise.gpu_values import (
    activated,
    affine,
    derivative,
    of_after,
    of_norm,
    passed,
    store_moments,
    store_sums,
)

__all__ = [
    "denormalise_kernel",
    "moments_kernel",
    "normalise_backward_kernel",
    "normalise_kernel",
    "statistics_kernel",
]


@triton.jit
def _tile(C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Program along the pixels, channels of this program."""
    blocks: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    o_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    return (tl.program_id(0) // blocks).to(tl.int64), o_n


@triton.jit
def _places(start, pixels, o_n, C: tl.constexpr, BLOCK_P: tl.constexpr):
    """[P, N] offsets and mask of the pixels from `start` on."""
    m_p = tl.arange(0, BLOCK_P) < pixels - start
    o = ((start + tl.arange(0, BLOCK_P)) * C)[:, None] + o_n[None, :]
    return o, m_p[:, None] & (o_n < C)[None, :]


@triton.jit
def statistics_kernel(
    x_ptr,  # [pixels, C]
    partial_ptr,  # [programs, 3, C]
    pixels,
    share,  # pixels of a program, a multiple of BLOCK_P
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Moments of a share of the pixels, around the mean of its first block."""
    program, o_n = _tile(C, BLOCK_N)
    begin = program * share
    end = tl.minimum(begin + share, pixels)
    o, mask = _places(begin, pixels, o_n, C, BLOCK_P)
    b = tl.load(x_ptr + o, mask=mask, other=0.0).to(tl.float32)
    b_pivot = tl.sum(b, axis=0) / tl.minimum(end - begin, BLOCK_P).to(tl.float32)
    b_sum = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    b_square = b_sum
    for start in range(begin, end, BLOCK_P):
        o, mask = _places(start, pixels, o_n, C, BLOCK_P)
        b = tl.load(x_ptr + o, mask=mask, other=0.0).to(tl.float32)
        b = tl.where(mask, b - b_pivot[None, :], 0.0)
        b_sum += b
        b_square += b * b
    b_sum, b_square = tl.sum(b_sum, axis=0), tl.sum(b_square, axis=0)
    count = (end - begin).to(tl.float32)
    store_moments(partial_ptr, program, o_n, o_n < C, count, b_pivot, b_sum, b_square, C)


@triton.jit
def moments_kernel(
    partial_ptr,  # [parts, 3, C]: count, mean, sum of squares around it
    mean_ptr,  # [C] fp32
    var_ptr,  # [C] fp32, biased
    parts,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Merge the moments of all programs around the first one's mean, always in the same order.

    Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances".
    """
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    # The first program has values, as later ones may not.
    b_pivot = tl.load(partial_ptr + C + o_n, mask=m_n, other=0.0)
    b_count = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    b_sum, b_square = b_count, b_count
    for start in range(0, parts, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        mask = (o_p < parts)[:, None] & m_n[None, :]
        p = partial_ptr + (o_p.to(tl.int64) * (3 * C))[:, None] + o_n[None, :]
        b_n = tl.load(p, mask=mask, other=0.0)
        b = tl.load(p + C, mask=mask, other=0.0) - b_pivot[None, :]
        b_count += b_n
        b_sum += b_n * b
        b_square += tl.load(p + 2 * C, mask=mask, other=0.0) + b_n * b * b
    count = tl.maximum(tl.sum(b_count, axis=0), 1.0)
    b_sum, b_square = tl.sum(b_sum, axis=0), tl.sum(b_square, axis=0)
    b = tl.div_rn(b_sum, count)
    tl.store(mean_ptr + o_n, b_pivot + b, mask=m_n)
    tl.store(var_ptr + o_n, tl.maximum(tl.div_rn(b_square - b_sum * b, count), 0.0), mask=m_n)


@triton.jit
def normalise_kernel(
    x_ptr,  # [pixels, C]
    norm,
    eps,
    residual_ptr,  # [pixels, C] or None
    y_ptr,  # [pixels, C]
    pixels,
    SUM_ACTIVATED: tl.constexpr,  # the residual is added in front of the activation
    ACT: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = act(norm(x)) + residual, or act(norm(x) + residual)."""
    program, o_n = _tile(C, BLOCK_N)
    o, mask = _places(program * BLOCK_P, pixels, o_n, C, BLOCK_P)
    b_mean, _, b_scale, b_shift = of_norm(norm, eps, o_n, o_n < C)
    b = tl.load(x_ptr + o, mask=mask, other=0.0).to(tl.float32)
    b = affine(b, b_mean, b_scale, b_shift, norm)
    if residual_ptr is None:
        b = activated(b, ACT)
    else:
        b_r = tl.load(residual_ptr + o, mask=mask, other=0.0).to(tl.float32)
        b = activated(b + b_r, ACT) if SUM_ACTIVATED else activated(b, ACT) + b_r
    tl.store(y_ptr + o, b.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def normalise_backward_kernel(
    g_ptr,  # [pixels, C]
    x_ptr,  # [pixels, C]
    norm,
    eps,
    residual_ptr,  # [pixels, C] where it is added in front of the activation, or None
    y_ptr,  # [pixels, C]
    partial_ptr,  # [programs, 2, C] or None
    pixels,
    share,
    ACT: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient behind the norm, and the sums of a share of the pixels."""
    program, o_n = _tile(C, BLOCK_N)
    begin = program * share
    b_mean, b_rstd, b_scale, b_shift = of_norm(norm, eps, o_n, o_n < C)
    b_sum = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    b_dot = b_sum
    for start in range(begin, tl.minimum(begin + share, pixels), BLOCK_P):
        o, mask = _places(start, pixels, o_n, C, BLOCK_P)
        b = tl.load(g_ptr + o, mask=mask, other=0.0).to(tl.float32)
        b_x = tl.load(x_ptr + o, mask=mask, other=0.0).to(tl.float32)
        b_v = affine(b_x, b_mean, b_scale, b_shift, norm)
        if residual_ptr is not None:
            b_v += tl.load(residual_ptr + o, mask=mask, other=0.0).to(tl.float32)
        b = passed(b, b_v, ACT).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + o, b, mask=mask)
        b = b.to(tl.float32)
        b_sum += b
        b_dot += b * ((b_x - b_mean[None, :]) * b_rstd[None, :])
    if partial_ptr is not None:
        b_sum, b_dot = tl.sum(b_sum, axis=0), tl.sum(b_dot, axis=0)
        store_sums(partial_ptr, program, o_n, o_n < C, b_sum, b_dot, C)


@triton.jit
def denormalise_kernel(
    g_ptr,  # [pixels, C]
    after,
    after_eps,
    y_ptr,  # [pixels, C]
    pixels,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient in front of the norm `after`."""
    program, o_n = _tile(C, BLOCK_N)
    o, mask = _places(program * BLOCK_P, pixels, o_n, C, BLOCK_P)
    b_mean, b_mean_g, b_slope, b_scale = of_after(after, after_eps, o_n, o_n < C, C)
    b = tl.load(g_ptr + o, mask=mask, other=0.0).to(tl.float32)
    b_out = tl.load(after[0] + o, mask=mask, other=0.0).to(tl.float32)
    b = derivative(b, b_out, b_mean, b_mean_g, b_slope, b_scale)
    tl.store(y_ptr + o, b.to(y_ptr.dtype.element_ty), mask=mask)
