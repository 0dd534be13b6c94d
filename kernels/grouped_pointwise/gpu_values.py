"""What the Triton kernels of `grouped_pointwise` do to values: norms, their derivative, statistics.

Names, in all kernels of this op: b_ block values, m_ masks, o_ offsets; p an output position, c or
n a channel of the result, k one of the input. Addresses of images are int64.

    norm   None or (mean, var, weight, bias), pointers to fp32 [C]
    after  None or (out, mean, var, weight, mean_sums), as inputs.After

A norm is written with `tl.fma`, so that every kernel finds the same sign in front of an activation.
"""

import triton
import triton.language as tl

__all__ = [
    "activated",
    "affine",
    "column_sums",
    "derivative",
    "of_after",
    "of_norm",
    "passed",
    "store_moments",
    "store_sums",
]


@triton.jit
def of_norm(norm, eps, o_c, m_c):
    """Mean, 1 / std, scale and bias of channels, fp32; those of the identity without a norm."""
    if norm is None:
        b_mean = tl.zeros_like(o_c).to(tl.float32)
        return b_mean, b_mean + 1.0, b_mean + 1.0, b_mean
    else:
        b_mean = tl.load(norm[0] + o_c, mask=m_c, other=0.0)
        b_rstd = _rstd(norm[1], eps, o_c, m_c)
        b_scale = tl.load(norm[2] + o_c, mask=m_c, other=0.0) * b_rstd
        return b_mean, b_rstd, b_scale, tl.load(norm[3] + o_c, mask=m_c, other=0.0)


@triton.jit
def _rstd(var_ptr, eps, o_c, m_c):
    return tl.div_rn(1.0, tl.sqrt_rn(tl.load(var_ptr + o_c, mask=m_c, other=1.0) + eps))


@triton.jit
def affine(b, b_mean, b_scale, b_bias, norm):
    """norm(b) of values [P, C] in fp32."""
    if norm is not None:
        b = tl.fma(b - b_mean[None, :], b_scale[None, :], b_bias[None, :])
    return b


@triton.jit
def activated(b, ACT: tl.constexpr):
    """The activation; a NaN passes."""
    if ACT != 0:
        b = tl.where(b < 0.0, 0.0, b)
    if ACT == 2:
        b = tl.where(b > 6.0, 6.0, b)
    return b


@triton.jit
def passed(b_g, b_v, ACT: tl.constexpr):
    """The gradient `b_g` through the activation of `b_v`."""
    if ACT != 0:
        b_g = tl.where(b_v > 0.0, b_g, 0.0)
    if ACT == 2:
        b_g = tl.where(b_v < 6.0, b_g, 0.0)
    return b_g


@triton.jit
def of_after(after, eps, o_c, m_c, C: tl.constexpr):
    """The four vectors of `derivative`."""
    b_mean = tl.load(after[1] + o_c, mask=m_c, other=0.0)
    b_rstd = _rstd(after[2], eps, o_c, m_c)
    b_scale = tl.load(after[3] + o_c, mask=m_c, other=0.0) * b_rstd
    b_g = tl.load(after[4] + o_c, mask=m_c, other=0.0)
    b_slope = -b_rstd * tl.load(after[4] + C + o_c, mask=m_c, other=0.0)
    return b_mean, b_g, b_slope, b_scale


@triton.jit
def derivative(b_g, b_out, b_mean, b_mean_g, b_slope, b_scale):
    """scale * (g - mean of g - xhat * mean of g * xhat), [P, C] in fp32."""
    b_g = b_g - b_mean_g[None, :]
    return tl.fma(b_out - b_mean[None, :], b_slope[None, :], b_g) * b_scale[None, :]


@triton.jit
def column_sums(b, WARPS: tl.constexpr):
    """[P, N] -> [WARPS * 8, N]: the sums over rows that a thread of a matrix tile holds.

    Rows of such a tile are [.., warp, 2, 8 lanes]: no lane needs another one's. `tl.sum` over all
    rows costs shuffles, so it is left for the end of a program.
    """
    P: tl.constexpr = b.shape[0]
    N: tl.constexpr = b.shape[1]
    b = tl.reshape(b, (P // (16 * WARPS), WARPS, 2, 8, N))
    return tl.reshape(tl.sum(tl.sum(b, axis=2), axis=0), (WARPS * 8, N))


@triton.jit
def store_moments(partial_ptr, program, o_c, m_c, count, b_pivot, b_sum, b_square, C: tl.constexpr):
    """Count, mean and sum of squares around it, of values that were summed around a pivot [C].

    partial_ptr: [programs, 3, C].
    """
    p = partial_ptr + program.to(tl.int64) * (3 * C) + o_c
    some = tl.maximum(count, 1.0)
    tl.store(p, tl.zeros_like(b_sum) + count, mask=m_c)
    tl.store(p + C, b_pivot + b_sum / some, mask=m_c)
    tl.store(p + 2 * C, b_square - b_sum * b_sum / some, mask=m_c)


@triton.jit
def store_sums(partial_ptr, program, o_c, m_c, b_sum, b_dot, C: tl.constexpr):
    """Sums of a gradient and of it times xhat. partial_ptr: [programs, 2, C]."""
    p = partial_ptr + program.to(tl.int64) * (2 * C) + o_c
    tl.store(p, b_sum, mask=m_c)
    tl.store(p + C, b_dot, mask=m_c)
