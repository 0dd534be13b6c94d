"""Grouped 3x3 convolutions as Triton kernels, and their data gradient; gpu.py launches them.

A tile of BLOCK_C channels holds whole groups, SET of its channels: its weights are block-diagonal,
[BLOCK_C, BLOCK_C] for each of the nine taps, and go through the matrix units, which for narrow
groups is cheaper than anything that vector units do (issue slots bind, not products). Wide groups
take several tiles of outputs and a loop over those of inputs. A value that is not finite spreads to
the channels of its tile.

A program of `slide_kernel` walks down the rows of a strip with three sums in flight: what it loads
serves three output rows. Rows that are `dilation` apart form a strip of their own.

The data gradient is the same convolution with weights mirrored and transposed. With a stride,
`gather_kernel` splits the pixels by their remainders: each class sees only the taps that meet it.
"""

import triton
import triton.language as tl

from fastkd.kernels.grouped_pointwise.gpu_values import store_moments

__all__ = ["gather_kernel", "nine_weights", "slide_kernel", "slide_row"]


@triton.jit
def _weight_places(weight_ptr, o_k, m_k, o_n, m_n, CPG: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[K, N] addresses of the first tap of the weights between channels; no weights between groups.

    CPG: channels per group.
    """
    mask = (o_k // CPG)[:, None] == (o_n // CPG)[None, :]
    mask = mask & m_k[:, None] & m_n[None, :]
    if TRANSPOSED:
        o_w = (o_k * CPG)[:, None] + (o_n % CPG)[None, :]
    else:
        o_w = (o_n * CPG)[None, :] + (o_k % CPG)[:, None]
    return weight_ptr + o_w * 9, mask


@triton.jit
def nine_weights(weight_ptr, o_c, m_c, like, CPG: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The tiles [C, C] of all taps, row by row; mirrored for the data gradient."""
    p, m = _weight_places(weight_ptr, o_c, m_c, o_c, m_c, CPG, TRANSPOSED)
    w0 = tl.load(p, mask=m, other=0.0).to(like)
    w1 = tl.load(p + 1, mask=m, other=0.0).to(like)
    w2 = tl.load(p + 2, mask=m, other=0.0).to(like)
    w3 = tl.load(p + 3, mask=m, other=0.0).to(like)
    w4 = tl.load(p + 4, mask=m, other=0.0).to(like)
    w5 = tl.load(p + 5, mask=m, other=0.0).to(like)
    w6 = tl.load(p + 6, mask=m, other=0.0).to(like)
    w7 = tl.load(p + 7, mask=m, other=0.0).to(like)
    w8 = tl.load(p + 8, mask=m, other=0.0).to(like)
    if TRANSPOSED:
        return w8, w7, w6, w5, w4, w3, w2, w1, w0
    else:
        return w0, w1, w2, w3, w4, w5, w6, w7, w8


@triton.jit
def slide_row(
    p_row,  # [P, C] addresses of column 0 of an input row
    m_row,  # [P]
    m_c,
    o_col,  # [P] columns of the first tap
    width,
    dilation,
    weights,  # of nine_weights
    b_first,  # sums of the output rows to which this row is the first, second, third
    b_second,
    b_third,
    ROW: tl.constexpr,  # which input row of the walk
    ROWS: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what one input row gives to the three output rows that see it."""
    for dx in tl.static_range(3):
        o_x = o_col + dx * dilation
        m_x = m_row & (o_x >= 0) & (o_x < width)
        b = tl.load(p_row + (o_x * C)[:, None], mask=m_x[:, None] & m_c[None, :], other=0.0)
        if ROW < ROWS:
            b_first = tl.dot(b, weights[dx], b_first, input_precision=PRECISION)
        if ROW >= 1 and ROW <= ROWS:
            b_second = tl.dot(b, weights[3 + dx], b_second, input_precision=PRECISION)
        if ROW >= 2:
            b_third = tl.dot(b, weights[6 + dx], b_third, input_precision=PRECISION)
    return b_first, b_second, b_third


@triton.jit
def slide_kernel(
    x_ptr,  # [num, height, width, C]
    weight_ptr,  # [C, CPG, 3, 3]
    bias_ptr,  # [C] or None
    y_ptr,  # [num, out_height, out_width, C]
    partial_ptr,  # [programs, 3, C] moments, or None
    num,
    height,
    width,
    out_height,
    out_width,
    stride,  # 1 with more than one row
    padding,
    dilation,
    C: tl.constexpr,
    CPG: tl.constexpr,
    SET: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Output rows `ROWS` of one strip, BLOCK_P columns (of several images), one tile of channels.

    TRANSPOSED: the data gradient.
    """
    tiles: tl.constexpr = (C + SET - 1) // SET
    tile = tl.program_id(0) % tiles
    program = tl.program_id(0) // tiles
    chunks = dilation * tl.cdiv(tl.cdiv(out_height, dilation), ROWS)
    chunk = program % chunks
    row = chunk % dilation + chunk // dilation * (ROWS * dilation)
    o_p = program // chunks * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < num * out_width
    image = (o_p // out_width).to(tl.int64)
    column = o_p % out_width
    o_c = tl.arange(0, BLOCK_C)
    m_c = (o_c < SET) & (tile * SET + o_c < C)
    o_c = tile * SET + o_c
    weights = nine_weights(weight_ptr, o_c, m_c, x_ptr.dtype.element_ty, CPG, TRANSPOSED)
    if bias_ptr is not None:
        b_bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    p_x = x_ptr + (image * (height * width * C))[:, None] + o_c[None, :]
    o_y = (image * (out_height * out_width * C) + column * C)[:, None] + o_c[None, :]
    b_first = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_second, b_third = b_first, b_first
    b_pivot = tl.zeros([BLOCK_C], tl.float32)
    b_sum, b_square = b_first, b_first
    columns = tl.sum(m_p.to(tl.float32), axis=0)
    count = columns * 0.0
    for i in tl.static_range(ROWS + 2):
        o_row = row * stride - padding + i * dilation
        m_row = m_p & (o_row >= 0) & (o_row < height)
        b_first, b_second, b_third = slide_row(
            p_x + o_row * (width * C),
            m_row,
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
            o_out = row + (i - 2) * dilation
            m_out = m_p & (o_out < out_height)
            mask = m_out[:, None] & m_c[None, :]
            o_here = o_y + o_out * (out_width * C)
            b = b_third
            if bias_ptr is not None:
                b += b_bias[None, :]
            b = b.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + o_here, b, mask=mask)
            if partial_ptr is not None:
                b = b.to(tl.float32)
                rows = tl.where(o_out < out_height, columns, 0.0)
                if i == 2:
                    b_pivot = tl.sum(tl.where(mask, b, 0.0), axis=0) / tl.maximum(rows, 1.0)
                count += rows
                b = tl.where(mask, b - b_pivot[None, :], 0.0)
                b_sum += b
                b_square += b * b
        b_third, b_second = b_second, b_first
        b_first = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    if partial_ptr is not None:
        b_sum, b_square = tl.sum(b_sum, axis=0), tl.sum(b_square, axis=0)
        store_moments(partial_ptr, program, o_c, m_c, count, b_pivot, b_sum, b_square, C)


@triton.jit
def _gathered(
    x_ptr,
    weight_ptr,
    o_image,  # [P] int64, element of x at which the image begins
    o_row,  # [P] row and column: of the output, in the data gradient divided by the stride
    o_column,
    m_p,
    height,
    width,
    o_n,  # channels of the result
    m_n,
    first,  # channel of the set
    H_CLASS: tl.constexpr,  # remainders of the data gradient's row and column
    W_CLASS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    C: tl.constexpr,
    CPG: tl.constexpr,
    SET: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[P, N] sums over the taps that meet these positions, and over the channels of the set."""
    P: tl.constexpr = m_p.shape[0]
    N: tl.constexpr = m_n.shape[0]
    like: tl.constexpr = x_ptr.dtype.element_ty
    b_y = tl.zeros([P, N], tl.float32)
    for begin in range(0, SET, N):
        o_k = begin + tl.arange(0, N)
        m_k = (o_k < SET) & (first + o_k < C)
        o_k = first + o_k
        p_w, m_w = _weight_places(weight_ptr, o_k, m_k, o_n, m_n, CPG, TRANSPOSED)
        for kh in tl.static_range(3):
            for kw in tl.static_range(3):
                # Conditions are written out: only so they are known to the compiler.
                if not TRANSPOSED or (
                    (H_CLASS + PADDING - DILATION * kh) % STRIDE == 0
                    and (W_CLASS + PADDING - DILATION * kw) % STRIDE == 0
                ):
                    if TRANSPOSED:
                        o_h = o_row + (H_CLASS + PADDING - DILATION * kh) // STRIDE
                        o_w = o_column + (W_CLASS + PADDING - DILATION * kw) // STRIDE
                    else:
                        o_h = o_row * STRIDE + (DILATION * kh - PADDING)
                        o_w = o_column * STRIDE + (DILATION * kw - PADDING)
                    m = m_p & (o_h >= 0) & (o_h < height) & (o_w >= 0) & (o_w < width)
                    o_x = (o_image + (o_h * width + o_w) * C)[:, None] + o_k[None, :]
                    b = tl.load(x_ptr + o_x, mask=m[:, None] & m_k[None, :], other=0.0)
                    b_w = tl.load(p_w + (3 * kh + kw), mask=m_w, other=0.0).to(like)
                    b_y = tl.dot(b, b_w, b_y, input_precision=PRECISION)
    return b_y


@triton.jit
def gather_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    num,
    height,
    width,
    out_height,
    out_width,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    C: tl.constexpr,
    CPG: tl.constexpr,
    SET: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_P output positions of one class and one tile of channels; arguments of slide_kernel."""
    PARTS: tl.constexpr = (SET + BLOCK_C - 1) // BLOCK_C
    tiles: tl.constexpr = (C + SET - 1) // SET * PARTS
    STEP: tl.constexpr = STRIDE if TRANSPOSED else 1
    tile = tl.program_id(0) % tiles
    program = tl.program_id(0) // tiles
    h_steps, w_steps = tl.cdiv(out_height, STEP), tl.cdiv(out_width, STEP)
    blocks = tl.cdiv(num * h_steps * w_steps, BLOCK_P)
    of_class = program // blocks
    o_p = program % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < num * h_steps * w_steps
    image = (o_p // (h_steps * w_steps)).to(tl.int64)
    o_row = o_p // w_steps % h_steps
    o_column = o_p % w_steps
    first = tile // PARTS * SET
    o_n = tile % PARTS * BLOCK_C + tl.arange(0, BLOCK_C)
    m_n = (o_n < SET) & (first + o_n < C)
    o_n = first + o_n
    b = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for c in tl.static_range(STEP * STEP):
        if of_class == c:
            b = _gathered(
                x_ptr,
                weight_ptr,
                image * (height * width * C),
                o_row,
                o_column,
                m_p,
                height,
                width,
                o_n,
                m_n,
                first,
                c // STEP,
                c % STEP,
                STRIDE,
                PADDING,
                DILATION,
                C,
                CPG,
                SET,
                TRANSPOSED,
                PRECISION,
            )
    o_row = o_row * STEP + of_class // STEP
    o_column = o_column * STEP + of_class % STEP
    m_p = m_p & (o_row < out_height) & (o_column < out_width)
    mask = m_p[:, None] & m_n[None, :]
    o_y = (image * (out_height * out_width * C) + (o_row * out_width + o_column) * C)[:, None]
    o_y = o_y + o_n[None, :]
    if bias_ptr is not None:
        b += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b = b.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + o_y, b, mask=mask)
    if partial_ptr is not None:
        b = tl.where(mask, b.to(tl.float32), 0.0)
        count = tl.sum(m_p.to(tl.float32), axis=0)
        b_pivot = tl.sum(b, axis=0) / tl.maximum(count, 1.0)
        b = tl.where(mask, b - b_pivot[None, :], 0.0)
        b_sum, b_square = tl.sum(b, axis=0), tl.sum(b * b, axis=0)
        store_moments(partial_ptr, program, o_n, m_n, count, b_pivot, b_sum, b_square, C)
