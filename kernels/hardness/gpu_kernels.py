"""The Triton kernels of `hardness` and `select_hardest`, in the formulas of README.md.

`score_kernel`: a program owns BLOCK_R rows and walks their classes BLOCK_C at a time with a running
maximum; rows that fit one block are read once. `rank_kernel`: the place of a score in the order is
the number of scores before it; a program counts that for BLOCK_R scores against all others, which
needs neither a sort nor a word between programs. gpu.py launches both.

Names: b_ block values, m_ masks, o_ offsets; s student (or the one tensor of a criterion),
t teacher. Addresses are int64.
"""

import triton
import triton.language as tl

from fastkd.kernels.gpu_kernels import LN2, LOG2E, NEAR_EQUAL, kl_term, tile

__all__ = ["rank_kernel", "score_kernel"]

# The places of `KINDS` (inputs.py).
KL, ENTROPY, CROSS_ENTROPY, MARGIN = (tl.constexpr(i) for i in range(4))


@triton.jit
def score_kernel(
    s_ptr,  # [rows, CLASSES] logits
    t_ptr,  # the same of the teacher; KL only, else None
    y_ptr,  # [rows] int64; CROSS_ENTROPY and MARGIN only, else None
    score_ptr,  # [rows] fp32
    num_rows,
    s_strides,  # (row, class)
    t_strides,
    temperature,
    KIND: tl.constexpr,
    CLASSES: tl.constexpr,
    ALIGN: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The score of each row by one criterion."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < num_rows
    o_c = tl.arange(0, BLOCK_C)
    # A stride like 1000 hides that rows start at multiples of ALIGN, which wide loads need to know.
    o_s = tl.multiple_of(o_r.to(tl.int64) * s_strides[0], ALIGN)
    o_t = tl.multiple_of(o_r.to(tl.int64) * t_strides[0], ALIGN)
    s_c, t_c = s_strides[1], t_strides[1]
    c_t = LOG2E / temperature if KIND == KL else LOG2E

    y = tl.zeros([BLOCK_R], tl.int64)
    b_y = tl.zeros([BLOCK_R], tl.float32)
    if KIND >= CROSS_ENTROPY:
        y = tl.load(y_ptr + o_r, mask=m_r, other=0)
        is_class = (y >= 0) & (y < CLASSES)
        b_y = tl.load(s_ptr + o_s + y * s_c, mask=m_r & is_class, other=float("nan")).to(tl.float32)

    # Maxima and sums. Sums are kept per lane and reduced once, after the walk.
    # A finite start: classes of minus infinity in the first block must not make NaN of inf - inf.
    ms = tl.full([BLOCK_R], float("-inf") if KIND == MARGIN else -3.0e38, tl.float32)
    mt = ms
    zs = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    zt, dot = zs, zs
    b_s, b_t = zs, zs
    for base in range(0, CLASSES, BLOCK_C):
        o_col = base + o_c
        m_col = o_col < CLASSES
        m_tile = m_r[:, None] & m_col[None, :]
        b_s = tile(s_ptr, o_s, o_col, s_c, m_tile, m_col)
        if KIND == MARGIN:
            # The sum of these is NaN where a class is, which maximum() would drop.
            dot += tl.where(b_s != b_s, b_s, 0.0)
            b_s = tl.where(o_col[None, :] == y[:, None], float("-inf"), b_s)
        new = tl.maximum(ms, tl.max(b_s, 1))
        fade = tl.exp2((ms - new) * c_t)
        if KIND == ENTROPY:
            # A sum of e * x after the maximum has changed.
            dot = dot * fade[:, None] + tl.where(zs > 0.0, zs * (fade * (ms - new))[:, None], 0.0)
        ms = new
        if KIND != MARGIN:
            x_s = b_s - ms[:, None]
            e = tl.exp2(x_s * c_t)
            zs = zs * fade[:, None] + e
            if KIND == ENTROPY:
                dot += tl.where(e == 0.0, 0.0, e * x_s)
        if KIND == KL:
            b_t = tile(t_ptr, o_t, o_col, t_c, m_tile, m_col)
            new = tl.maximum(mt, tl.max(b_t, 1))
            fade = tl.exp2((mt - new) * c_t)
            mt = new
            e = tl.exp2((b_t - mt[:, None]) * c_t)
            zt = zt * fade[:, None] + e
            dot = dot * fade[:, None] + tl.where(e == 0.0, 0.0, e * (b_t - b_s))

    r_zs, r_dot = tl.sum(zs, 1), tl.sum(dot, 1)
    l_s = tl.log2(r_zs)
    score = r_dot + (ms - b_y)
    if KIND == ENTROPY:
        score = l_s * LN2 - r_dot / r_zs
    if KIND == CROSS_ENTROPY:
        score = l_s * LN2 + (ms - b_y)
    if KIND == KL:
        r_zt = tl.sum(zt, 1)
        l_t = tl.log2(r_zt)
        # The logarithm of the ratio: the sums' own logarithms are large and round more.
        score = (r_dot / r_zt + (ms - mt)) / temperature - tl.log2(r_zt / r_zs) * LN2
        # A second walk only where the plain difference would cancel.
        low = m_r & (score < NEAR_EQUAL)
        if tl.max(low.to(tl.int32), 0) > 0:
            acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
            for base in range(0, CLASSES, BLOCK_C):
                o_col = base + o_c
                m_col = o_col < CLASSES
                m_tile = m_r[:, None] & m_col[None, :]
                if not ONE_TILE:
                    b_s = tile(s_ptr, o_s, o_col, s_c, m_tile, m_col)
                    b_t = tile(t_ptr, o_t, o_col, t_c, m_tile, m_col)
                x_s = tl.fma(b_s - ms[:, None], c_t, -l_s[:, None])
                x_t = tl.fma(b_t - mt[:, None], c_t, -l_t[:, None])
                p = tl.exp2(x_t)
                # Where p is 0, the difference may be no number.
                u = tl.where(p > 0.0, (x_t - x_s) * LN2, 0.0)
                acc += tl.where(m_tile, kl_term(p, tl.exp2(x_s), u), 0.0)
            score = tl.where(low, tl.sum(acc, 1), score)
    tl.store(score_ptr + o_r, score, mask=m_r)


@triton.jit
def _keys(score_ptr, o, num_rows):
    """int64, larger for what comes earlier in the order; below all of them past the last row."""
    m = o < num_rows
    b = tl.load(score_ptr + o, mask=m, other=0.0).to(tl.float32)
    # Minus zero and zero are a tie. Negative floats order backwards as integers.
    bits = tl.where(b == 0.0, 0.0, b).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    is_nan = b != b
    bits = tl.where(is_nan, -0x80000000, bits)
    key = (bits.to(tl.int64) << 32) + (0x7FFFFFFF - o)
    return tl.where(m, key, -0x8000000000000000), m & is_nan


@triton.jit
def rank_kernel(
    score_ptr,  # [rows]
    index_ptr,  # [k] int64
    num_nan_ptr,  # int64
    num_rows,
    k,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """index[place of score r] = r for the first k places; the number of NaN scores."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    key_r, _ = _keys(score_ptr, o_r, num_rows)
    before = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    nan = tl.zeros([BLOCK_C], tl.int32)
    for base in range(0, num_rows, BLOCK_C):
        key_c, is_nan = _keys(score_ptr, base + tl.arange(0, BLOCK_C), num_rows)
        before += (key_c[None, :] > key_r[:, None]).to(tl.int32)
        nan += is_nan.to(tl.int32)
    place = tl.sum(before, 1)
    tl.store(index_ptr + place, o_r.to(tl.int64), mask=(o_r < num_rows) & (place < k))
    if tl.program_id(0) == 0:
        tl.store(num_nan_ptr, tl.sum(nan, 0).to(tl.int64))
