"""The Triton kernels of `attention_map`, in the formulas of README.md; gpu.py launches them.

A program owns a stretch of BLOCK_P pixels of the map and walks the channels in tiles [BLOCK_C,
BLOCK_P], pooling on the way. Sums of powers are kept per lane and reduced once, after the walk.
Whichever of channels and pixels is contiguous in memory, loads run along it: its stride is 1 at
compile time.

Names: b_ block values, m_ masks, o_ offsets; s student, t teacher. Addresses are int64.
"""

import triton
import triton.language as tl

__all__ = ["forward_kernel", "gradient_kernel"]


@triton.jit
def _pointers(
    ptr, n, o_c, o_p, sample, channel, row, pixel, BY_PIXEL: tl.constexpr, ALIGN: tl.constexpr,
    WIDTH: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
):  # fmt: skip
    """[C, P] addresses of the first element of each window of sample n.

    Rows lie `row` elements apart. BY_PIXEL: pixels are contiguous, else channels. Samples and lines
    along that axis start at multiples of ALIGN elements, which Triton cannot know of a stride like
    196 and needs for wide loads.
    """
    if WINDOW_H * WINDOW_W == 1:
        o_x = o_p.to(tl.int64) * pixel
    else:
        o_x = (o_p // WIDTH).to(tl.int64) * (WINDOW_H * row) + (o_p % WIDTH) * (WINDOW_W * pixel)
    o_n = tl.multiple_of(n * sample, ALIGN)
    o_c = o_c.to(tl.int64) * channel
    if BY_PIXEL:
        o_c = tl.multiple_of(o_c, ALIGN)
    else:
        o_x = tl.multiple_of(o_x, ALIGN)
    return ptr + o_n + o_c[:, None] + o_x[None, :]


@triton.jit
def _average(pointers, mask, row, pixel, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """Mean over the window that begins at each pointer, in fp32."""
    b = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    for k in tl.static_range(1, WINDOW_H * WINDOW_W):
        o = (k // WINDOW_W) * row + (k % WINDOW_W) * pixel
        b += tl.load(pointers + o, mask=mask, other=0.0).to(tl.float32)
    return b * (1.0 / (WINDOW_H * WINDOW_W))


@triton.jit
def _power(b, POWER: tl.constexpr):
    if POWER == 1:
        return tl.abs(b)
    if POWER == 2:
        return b * b
    return (b * b) * (b * b)


@triton.jit
def _slope(b, POWER: tl.constexpr):
    if POWER == 1:
        return tl.where(b > 0.0, 1.0, tl.where(b < 0.0, -1.0, b))
    if POWER == 2:
        return b + b
    return 4.0 * (b * (b * b))


@triton.jit
def _energy(
    ptr, n, o_p, m_p, channels, sample, channel, row, pixel,
    POWER: tl.constexpr, BY_PIXEL: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Mean over channels of |x|^POWER for a stretch of pixels, [BLOCK_P]."""
    o_c = tl.arange(0, BLOCK_C)
    pointers = _pointers(ptr, n, o_c, o_p, sample, channel, row, pixel, BY_PIXEL, ALIGN, WIDTH,
                         WINDOW_H, WINDOW_W)  # fmt: skip
    sums = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for first in range(0, channels, BLOCK_C):
        mask = (first + o_c < channels)[:, None] & m_p[None, :]
        sums += _power(_average(pointers, mask, row, pixel, WINDOW_H, WINDOW_W), POWER)
        pointers += BLOCK_C * channel
    return tl.div_rn(tl.sum(sums, 0), channels * 1.0)


@triton.jit
def forward_kernel(
    s_ptr, t_ptr, s_energy_ptr, t_energy_ptr, coefficient_ptr, rows_ptr,
    s_channels, s_sample, s_channel, s_row, s_pixel,
    t_channels, t_sample, t_channel, t_row, t_pixel, samples, eps,
    POWER: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr, S_H: tl.constexpr,
    S_W: tl.constexpr, T_H: tl.constexpr, T_W: tl.constexpr, S_BY_PIXEL: tl.constexpr,
    T_BY_PIXEL: tl.constexpr, S_ALIGN: tl.constexpr, T_ALIGN: tl.constexpr, TEACHER: tl.constexpr,
    DISTANCE: tl.constexpr, PHASE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """PHASE 0: one program per sample. 1: only energies, a stretch each. 2: only the comparison."""
    n = tl.program_id(0).to(tl.int64)
    first = 0
    last = PIXELS
    if PHASE == 1:
        first = tl.program_id(0) % tl.cdiv(PIXELS, BLOCK_P) * BLOCK_P
        last = first + BLOCK_P
        n = n // tl.cdiv(PIXELS, BLOCK_P)
    if PHASE != 2:
        for begin in range(first, last, BLOCK_P):
            o_p = begin + tl.arange(0, BLOCK_P)
            m_p = o_p < PIXELS
            b_s = _energy(s_ptr, n, o_p, m_p, s_channels, s_sample, s_channel, s_row, s_pixel,
                          POWER, S_BY_PIXEL, S_ALIGN, WIDTH, S_H, S_W, BLOCK_S,
                          BLOCK_P)  # fmt: skip
            tl.store(s_energy_ptr + n * PIXELS + o_p, b_s, mask=m_p)
            if TEACHER:
                b_t = _energy(t_ptr, n, o_p, m_p, t_channels, t_sample, t_channel, t_row, t_pixel,
                              POWER, T_BY_PIXEL, T_ALIGN, WIDTH, T_H, T_W, BLOCK_T,
                              BLOCK_P)  # fmt: skip
                tl.store(t_energy_ptr + n * PIXELS + o_p, b_t, mask=m_p)
    if PHASE == 1:
        return
    if PHASE == 0:
        # The energies come from other threads of this program.
        tl.debug_barrier()

    o_x = tl.arange(0, BLOCK_X)
    p_s = s_energy_ptr + n * PIXELS + o_x
    p_t = t_energy_ptr + n * PIXELS + o_x
    ss = tl.zeros([BLOCK_X], tl.float32)
    tt = ss
    for begin in range(0, PIXELS, BLOCK_X):
        m_x = begin + o_x < PIXELS
        b_s = tl.load(p_s + begin, mask=m_x, other=0.0)
        b_t = tl.load(p_t + begin, mask=m_x, other=0.0)
        ss += b_s * b_s
        tt += b_t * b_t
    norm = tl.sqrt_rn(tl.sum(ss, 0))
    by_s = tl.maximum(norm, eps)
    by_t = tl.maximum(tl.sqrt_rn(tl.sum(tt, 0)), eps)

    squares = tl.zeros([BLOCK_X], tl.float32)
    products = squares
    for begin in range(0, PIXELS, BLOCK_X):
        m_x = begin + o_x < PIXELS
        b_map = tl.div_rn(tl.load(p_s + begin, mask=m_x, other=0.0), by_s)
        gap = b_map - tl.div_rn(tl.load(p_t + begin, mask=m_x, other=0.0), by_t)
        squares += gap * gap
        products += b_map * gap
    square = tl.sum(squares, 0)
    root = tl.sqrt_rn(square)
    # Below eps the divisor is a constant, and the map's length is free to change.
    along = tl.where(norm < eps, 0.0, tl.sum(products, 0))
    if DISTANCE:
        value = tl.div_rn(root, samples)
        # Equal maps: the norm has no derivative there and takes 0.
        outer = tl.where(square == 0.0, 0.0, tl.div_rn(1.0, root * samples))
    else:
        value = tl.div_rn(square, samples * PIXELS)
        outer = tl.div_rn(2.0, samples * PIXELS)
    tl.store(rows_ptr + n, value)
    for begin in range(0, PIXELS, BLOCK_X):
        m_x = begin + o_x < PIXELS
        b_map = tl.div_rn(tl.load(p_s + begin, mask=m_x, other=0.0), by_s)
        gap = b_map - tl.div_rn(tl.load(p_t + begin, mask=m_x, other=0.0), by_t)
        b = tl.div_rn(outer * (gap - along * b_map), by_s)
        tl.store(coefficient_ptr + n * PIXELS + begin + o_x, b, mask=m_x)


@triton.jit
def gradient_kernel(
    x_ptr, coefficient_ptr, upstream_ptr, g_ptr,
    channels, x_sample, x_channel, x_row, x_pixel, g_sample, g_channel, g_row, g_pixel,
    UPSTREAM: tl.constexpr, POWER: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, BY_PIXEL: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient: the pixel's coefficient times the derivative of |x|^POWER."""
    n = tl.program_id(0).to(tl.int64) // tl.cdiv(PIXELS, BLOCK_P)
    o_p = tl.program_id(0) % tl.cdiv(PIXELS, BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_p = o_p < PIXELS
    mask = (o_c < channels)[:, None] & m_p[None, :]
    b_k = tl.load(coefficient_ptr + n * PIXELS + o_p, mask=m_p, other=0.0)
    if UPSTREAM:
        b_k *= tl.load(upstream_ptr).to(tl.float32)
    b_k = tl.div_rn(b_k, channels * (1.0 * WINDOW_H * WINDOW_W))
    p_x = _pointers(x_ptr, n, o_c, o_p, x_sample, x_channel, x_row, x_pixel, BY_PIXEL, ALIGN,
                    WIDTH, WINDOW_H, WINDOW_W)  # fmt: skip
    b_g = b_k[None, :] * _slope(_average(p_x, mask, x_row, x_pixel, WINDOW_H, WINDOW_W), POWER)
    p_g = _pointers(g_ptr, n, o_c, o_p, g_sample, g_channel, g_row, g_pixel, BY_PIXEL, ALIGN,
                    WIDTH, WINDOW_H, WINDOW_W)  # fmt: skip
    for k in tl.static_range(0, WINDOW_H * WINDOW_W):
        o_k = (k // WINDOW_W) * g_row + (k % WINDOW_W) * g_pixel
        tl.store(p_g + o_k, b_g.to(g_ptr.dtype.element_ty), mask=mask)
