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
    ptr,
    n,
    o_c,
    o_p,
    strides,
    BY_PIXEL: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
):
    """[C, P] addresses of the first element of each window of sample n.

    BY_PIXEL: pixels are contiguous, else channels. Samples and lines along that axis start at
    multiples of ALIGN elements, which Triton cannot know of a stride like 196 and needs for wide
    loads.
    """
    sample, channel, row, pixel = strides
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
def _average(pointers, mask, strides, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """Mean over the window that begins at each pointer, in fp32."""
    _, _, row, pixel = strides
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
    ptr,
    n,
    o_p,
    m_p,
    channels,
    strides,
    POWER: tl.constexpr,
    BY_PIXEL: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean over channels of |x|^POWER for the pixels o_p."""
    o_c = tl.arange(0, BLOCK_C)
    pointers = _pointers(ptr, n, o_c, o_p, strides, BY_PIXEL, ALIGN, WIDTH, WINDOW_H, WINDOW_W)
    sums = tl.zeros([BLOCK_C, o_p.shape[0]], tl.float32)
    for first in range(0, channels, BLOCK_C):
        mask = (first + o_c < channels)[:, None] & m_p[None, :]
        sums += _power(_average(pointers, mask, strides, WINDOW_H, WINDOW_W), POWER)
        pointers += BLOCK_C * strides[1]
    return tl.div_rn(tl.sum(sums, 0), channels * 1.0)


@triton.jit
def _compare(
    s_ptr,  # [PIXELS] energies of the student
    t_ptr,  # of the teacher
    coefficient_ptr,  # [PIXELS]
    value_ptr,  # the sample's share of the loss
    samples,
    eps,
    PIXELS: tl.constexpr,
    DISTANCE: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Loss of one sample and its derivative at the student's energies."""
    o_x = tl.arange(0, BLOCK_X)
    p_s = s_ptr + o_x
    p_t = t_ptr + o_x
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
    tl.store(value_ptr, value)
    for begin in range(0, PIXELS, BLOCK_X):
        m_x = begin + o_x < PIXELS
        b_map = tl.div_rn(tl.load(p_s + begin, mask=m_x, other=0.0), by_s)
        gap = b_map - tl.div_rn(tl.load(p_t + begin, mask=m_x, other=0.0), by_t)
        b = tl.div_rn(outer * (gap - along * b_map), by_s)
        tl.store(coefficient_ptr + begin + o_x, b, mask=m_x)


@triton.jit
def forward_kernel(
    s_ptr,  # [samples, s_channels, height, width] of the student
    t_ptr,  # the same of the teacher, or None
    s_energy_ptr,  # [samples, PIXELS] fp32
    t_energy_ptr,  # the same, or None
    coefficient_ptr,  # [samples, PIXELS] fp32: d loss / d energy of the student, or None
    rows_ptr,  # [samples] fp32: each sample's share of the loss, or None
    s_channels,
    t_channels,
    s_strides,  # (sample, channel, row, pixel)
    t_strides,
    samples,
    eps,
    POWER: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    S_H: tl.constexpr,
    S_W: tl.constexpr,
    T_H: tl.constexpr,
    T_W: tl.constexpr,
    S_BY_PIXEL: tl.constexpr,
    T_BY_PIXEL: tl.constexpr,
    S_ALIGN: tl.constexpr,
    T_ALIGN: tl.constexpr,
    DISTANCE: tl.constexpr,
    PHASE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """PHASE 0: one program per sample. 1: only energies, a stretch each. 2: only the comparison.

    PIXELS and WIDTH describe the map. Each of its pixels is the average of a window: S_H x S_W
    pixels of the student's features and T_H x T_W of the teacher's.
    """
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
            b_s = _energy(
                s_ptr,
                n,
                o_p,
                m_p,
                s_channels,
                s_strides,
                POWER,
                S_BY_PIXEL,
                S_ALIGN,
                WIDTH,
                S_H,
                S_W,
                BLOCK_S,
            )
            tl.store(s_energy_ptr + n * PIXELS + o_p, b_s, mask=m_p)
            if t_ptr is not None:
                b_t = _energy(
                    t_ptr,
                    n,
                    o_p,
                    m_p,
                    t_channels,
                    t_strides,
                    POWER,
                    T_BY_PIXEL,
                    T_ALIGN,
                    WIDTH,
                    T_H,
                    T_W,
                    BLOCK_T,
                )
                tl.store(t_energy_ptr + n * PIXELS + o_p, b_t, mask=m_p)
    if PHASE == 0:
        # The energies come from other threads of this program.
        tl.debug_barrier()
    if PHASE != 1:
        _compare(
            s_energy_ptr + n * PIXELS,
            t_energy_ptr + n * PIXELS,
            coefficient_ptr + n * PIXELS,
            rows_ptr + n,
            samples,
            eps,
            PIXELS,
            DISTANCE,
            BLOCK_X,
        )


@triton.jit
def gradient_kernel(
    x_ptr,  # [samples, channels, height, width]
    coefficient_ptr,  # [samples, PIXELS] fp32
    upstream_ptr,  # one number, or None: 1
    g_ptr,  # the gradient, of x_ptr's shape
    channels,
    x_strides,  # (sample, channel, row, pixel)
    g_strides,
    POWER: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    BY_PIXEL: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One tile of the gradient: the pixel's coefficient times the derivative of |x|^POWER."""
    n = tl.program_id(0).to(tl.int64) // tl.cdiv(PIXELS, BLOCK_P)
    o_p = tl.program_id(0) % tl.cdiv(PIXELS, BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_p = o_p < PIXELS
    mask = (o_c < channels)[:, None] & m_p[None, :]
    b_k = tl.load(coefficient_ptr + n * PIXELS + o_p, mask=m_p, other=0.0)
    if upstream_ptr is not None:
        b_k *= tl.load(upstream_ptr).to(tl.float32)
    b_k = tl.div_rn(b_k, channels * (1.0 * WINDOW_H * WINDOW_W))
    p_x = _pointers(x_ptr, n, o_c, o_p, x_strides, BY_PIXEL, ALIGN, WIDTH, WINDOW_H, WINDOW_W)
    b_g = b_k[None, :] * _slope(_average(p_x, mask, x_strides, WINDOW_H, WINDOW_W), POWER)
    p_g = _pointers(g_ptr, n, o_c, o_p, g_strides, BY_PIXEL, ALIGN, WIDTH, WINDOW_H, WINDOW_W)
    for k in tl.static_range(0, WINDOW_H * WINDOW_W):
        o_k = (k // WINDOW_W) * g_strides[2] + (k % WINDOW_W) * g_strides[3]
        tl.store(p_g + o_k, b_g.to(g_ptr.dtype.element_ty), mask=mask)
