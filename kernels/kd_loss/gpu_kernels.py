"""The Triton kernels of `kd_loss`, in the formulas of README.md; gpu.py launches them.

A program owns a tile of [BLOCK_R rows, BLOCK_C classes]. Rows that fit one tile are read once;
longer ones are walked with a running maximum; few and very long ones are split over programs and
merged.
The forward pass leaves four numbers per row and two per teacher (maxima, log2 of the sums, mass of
the target), from which the gradient is one elementwise pass.

Names: b_ block values, m_ masks, o_ offsets, p_ parts of a split row; s student, t teacher.
Addresses are int64.
"""

import triton
import triton.language as tl
from fastkd.kernels.gpu_kernels import LN2, LOG2E, NEAR_EQUAL, kl_term, tile

__all__ = ["forward_kernel", "gradient_kernel", "reduce_kernel"]


@triton.jit
def _logits(ptr, o_row, o_col, stride_c, m_tile):
    """[R, C] logits in fp32, 0 beyond the last class: for results that are not stored there."""
    b = tl.load(ptr + o_row[:, None] + o_col[None, :] * stride_c, mask=m_tile, other=0.0)
    return b.to(tl.float32)


@triton.jit
def _rows_at(o_r, inner, stride_n, stride_p, ALIGN: tl.constexpr):
    """Offset of each row's first class: samples stride_n apart, pixels stride_p.

    ALIGN 0: pixels. Else classes are a row's only axis and rows start at multiples of ALIGN
    elements, which Triton cannot know of a stride like 1000 and needs for wide loads.
    """
    if ALIGN > 0:
        return tl.multiple_of(o_r.to(tl.int64) * stride_n, ALIGN)
    # 32-bit division keeps the lanes' contiguity visible; only the offset needs 64 bits.
    return (o_r // inner).to(tl.int64) * stride_n + (o_r % inner).to(tl.int64) * stride_p


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
    num_rows, inner,
    s_n, s_p, s_c, t_n, t_p, t_c, y_n, y_p, y_c,
    temperature, smoothing, ignore_index, kd_weight, ce_weight, splits,
    TEACHERS: tl.constexpr, LABELS: tl.constexpr, WEIGHTS: tl.constexpr, MASK: tl.constexpr,
    SMOOTH: tl.constexpr, PER_ROW: tl.constexpr, ALIGN: tl.constexpr, CLASSES: tl.constexpr,
    ONE_TILE: tl.constexpr, PHASE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """PHASE 0: whole rows. 1: sums of one part of a row into work. 2: merge the parts, finish."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < num_rows
    o_c = tl.arange(0, BLOCK_C)
    o_s = _rows_at(o_r, inner, s_n, s_p, ALIGN)
    o_t = _rows_at(o_r, inner, t_n, t_p, ALIGN)
    o_y = _rows_at(o_r, inner, y_n, y_p, ALIGN)
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
    last = CLASSES
    if PHASE == 1:
        part = tl.cdiv(tl.cdiv(CLASSES, splits), BLOCK_C) * BLOCK_C
        first = tl.program_id(1) * part
        last = tl.minimum(first + part, CLASSES)
    if PHASE == 2:
        last = 0
    for base in range(first, last, BLOCK_C):
        o_col = base + o_c
        m_col = o_col < CLASSES
        m_tile = m_r[:, None] & m_col[None, :]
        b_s = tile(s_ptr, o_s, o_col, s_c, m_tile, m_col)
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
            b_t = tile(t0_ptr, o_t, o_col, t_c, m_tile, m_col)
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
            b = tile(t1_ptr, o_t, o_col, t_c, m_tile, m_col)
            new = tl.maximum(mt1, tl.max(b, 1))
            zt1 = zt1 * tl.exp2((mt1 - new) * c_t)[:, None] + tl.exp2((b - new[:, None]) * c_t)
            mt1 = new
        if TEACHERS > 2:
            b = tile(t2_ptr, o_t, o_col, t_c, m_tile, m_col)
            new = tl.maximum(mt2, tl.max(b, 1))
            zt2 = zt2 * tl.exp2((mt2 - new) * c_t)[:, None] + tl.exp2((b - new[:, None]) * c_t)
            mt2 = new
        if TEACHERS > 3:
            b = tile(t3_ptr, o_t, o_col, t_c, m_tile, m_col)
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
        last = CLASSES

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
                m_col = o_col < CLASSES
                m_tile = m_r[:, None] & m_col[None, :]
                if not ONE_TILE:
                    b_s = tile(s_ptr, o_s, o_col, s_c, m_tile, m_col)
                    b_t = tile(t0_ptr, o_t, o_col, t_c, m_tile, m_col)
                x_s = tl.fma(b_s - ms[:, None], c_t, -l_s[:, None])
                x_t = tl.fma(b_t - mt[:, None], c_t, -l_t[:, None])
                q = tl.exp2(x_s)
                p = tl.exp2(x_t)
                if TEACHERS == 1:
                    u = (x_t - x_s) * LN2
                if TEACHERS > 1:
                    b = tile(t1_ptr, o_t, o_col, t_c, m_tile, m_col)
                    p += tl.exp2(tl.fma(b - mt1[:, None], c_t, -l_t1[:, None]))
                    if TEACHERS > 2:
                        b = tile(t2_ptr, o_t, o_col, t_c, m_tile, m_col)
                        p += tl.exp2(tl.fma(b - mt2[:, None], c_t, -l_t2[:, None]))
                    if TEACHERS > 3:
                        b = tile(t3_ptr, o_t, o_col, t_c, m_tile, m_col)
                        p += tl.exp2(tl.fma(b - mt3[:, None], c_t, -l_t3[:, None]))
                    p = p * (1.0 / TEACHERS)
                    u = (tl.log2(p) - x_s) * LN2
                    if PER_ROW:
                        top, at = _first_max(p, o_c, base)
                        at_t = tl.where(top > best, at, at_t)
                        best = tl.maximum(best, top)
                # Where p is 0, u may be no number.
                u = tl.where(p > 0.0, u, 0.0)
                acc += tl.where(m_tile, kl_term(p, q, u), 0.0)
            kl = tl.where(low, tl.sum(acc, 1), kl)

    # 3. Cross entropy, weights, and what the row leaves behind.
    counts = m_r
    if MASK:
        counts = counts & (tl.load(mask_ptr + o_r, mask=m_r, other=0) != 0)
    ce = tl.zeros([BLOCK_R], tl.float32)
    mass_y = tl.full([BLOCK_R], 1.0, tl.float32)
    if LABELS > 0:
        dot_y = r_dot
        if LABELS == 2:
            mass_y = r_mass
        if LABELS == 1:
            y = tl.load(y_ptr + o_r, mask=m_r, other=0)
            counts = counts & (y != ignore_index)
            known = counts & (y >= 0) & (y < CLASSES)
            b = tl.load(s_ptr + o_s + y * s_c, mask=known, other=float("nan"))
            dot_y = b.to(tl.float32)
        if SMOOTH:
            dot_y = (1.0 - smoothing) * dot_y + (smoothing / CLASSES) * r_flat
            mass_y = (1.0 - smoothing) * mass_y + smoothing
        ce = mass_y * (l_1 * LN2) - (dot_y - mass_y * ms)
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
    # Statistics lie as [4 + 2 * TEACHERS, rows].
    o_x = stats_ptr + o_r
    n_x = num_rows.to(tl.int64)
    tl.store(o_x, ms, mask=m_r)
    tl.store(o_x + n_x, l_s, mask=m_r)
    tl.store(o_x + 2 * n_x, l_1, mask=m_r)
    tl.store(o_x + 3 * n_x, mass_y, mask=m_r)
    if TEACHERS > 0:
        tl.store(o_x + 4 * n_x, mt, mask=m_r)
        tl.store(o_x + 5 * n_x, l_t, mask=m_r)
    if TEACHERS > 1:
        tl.store(o_x + 6 * n_x, mt1, mask=m_r)
        tl.store(o_x + 7 * n_x, l_t1, mask=m_r)
    if TEACHERS > 2:
        tl.store(o_x + 8 * n_x, mt2, mask=m_r)
        tl.store(o_x + 9 * n_x, l_t2, mask=m_r)
    if TEACHERS > 3:
        tl.store(o_x + 10 * n_x, mt3, mask=m_r)
        tl.store(o_x + 11 * n_x, l_t3, mask=m_r)


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
def _probability(ptr, o_row, o_col, stride_c, m_tile, m_r, stat_ptr, n_x, c_t):
    """softmax(x / T) from a row's maximum and log2 of its sum, which lie n_x apart."""
    b = _logits(ptr, o_row, o_col, stride_c, m_tile)
    top = tl.load(stat_ptr, mask=m_r, other=0.0)
    log_z = tl.load(stat_ptr + n_x, mask=m_r, other=0.0)
    return tl.exp2(tl.fma(b - top[:, None], c_t, -log_z[:, None]))


@triton.jit
def gradient_kernel(
    s_ptr, t0_ptr, t1_ptr, t2_ptr, t3_ptr, y_ptr, w_ptr, mask_ptr, g_ptr, stats_ptr,
    up_kd_ptr, up_ce_ptr, divisor_ptr,
    num_rows, inner,
    s_n, s_p, s_c, t_n, t_p, t_c, y_n, y_p, y_c, g_n, g_p, g_c,
    temperature, smoothing, ignore_index, kd_scale, ce_scale, up_kd_step, up_ce_step,
    TEACHERS: tl.constexpr, LABELS: tl.constexpr, WEIGHTS: tl.constexpr, MASK: tl.constexpr,
    SMOOTH: tl.constexpr, DIVISOR: tl.constexpr, KD: tl.constexpr, CE: tl.constexpr,
    ALIGN: tl.constexpr, CLASSES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of a * (p_s - p_t) + b * (sum(y) p_1 - y)."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_r = o_r < num_rows
    m_col = o_col < CLASSES
    m_tile = m_r[:, None] & m_col[None, :]
    o_s = _rows_at(o_r, inner, s_n, s_p, ALIGN)
    c_t = LOG2E / temperature
    counts = m_r
    if MASK:
        counts = counts & (tl.load(mask_ptr + o_r, mask=m_r, other=0) != 0)
    weight = tl.full([BLOCK_R], 1.0, tl.float32)
    if WEIGHTS:
        weight = tl.load(w_ptr + o_r, mask=m_r, other=0.0).to(tl.float32)
    if DIVISOR:
        weight = weight / tl.load(divisor_ptr)
    o_x = stats_ptr + o_r
    n_x = num_rows.to(tl.int64)
    b_s = _logits(s_ptr, o_s, o_col, s_c, m_tile)
    x_s = b_s - tl.load(o_x, mask=m_r, other=0.0)[:, None]
    grad = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if KD:
        o_t = _rows_at(o_r, inner, t_n, t_p, ALIGN)
        l_s = tl.load(o_x + n_x, mask=m_r, other=0.0)
        # No product to contract: for equal logits the two are equal bits and leave exactly 0.
        p_s = tl.exp2(tl.fma(x_s, c_t, -l_s[:, None]))
        p_t = _probability(t0_ptr, o_t, o_col, t_c, m_tile, m_r, o_x + 4 * n_x, n_x, c_t)
        if TEACHERS > 1:
            p_t += _probability(t1_ptr, o_t, o_col, t_c, m_tile, m_r, o_x + 6 * n_x, n_x, c_t)
        if TEACHERS > 2:
            p_t += _probability(t2_ptr, o_t, o_col, t_c, m_tile, m_r, o_x + 8 * n_x, n_x, c_t)
        if TEACHERS > 3:
            p_t += _probability(t3_ptr, o_t, o_col, t_c, m_tile, m_r, o_x + 10 * n_x, n_x, c_t)
        if TEACHERS > 1:
            p_t = p_t * (1.0 / TEACHERS)
        up = tl.load(up_kd_ptr + o_r * up_kd_step, mask=m_r, other=0.0).to(tl.float32)
        grad = (up * weight * (kd_scale * temperature))[:, None] * (p_s - p_t)
    if LABELS == 1:
        y = tl.load(y_ptr + o_r, mask=m_r, other=0)
        counts = counts & (y != ignore_index)
    if CE:
        l_1 = tl.load(o_x + 2 * n_x, mask=m_r, other=0.0)
        p_1 = tl.exp2(tl.fma(x_s, LOG2E, -l_1[:, None]))
        if LABELS == 1:
            target = tl.where(o_col[None, :] == y[:, None], 1.0 - smoothing, 0.0)
        else:
            o_y = _rows_at(o_r, inner, y_n, y_p, ALIGN)
            o_yc = o_y[:, None] + o_col[None, :] * y_c
            target = tl.load(y_ptr + o_yc, mask=m_tile, other=0.0).to(tl.float32)
            target = target * (1.0 - smoothing)
            p_1 = p_1 * tl.load(o_x + 3 * n_x, mask=m_r, other=0.0)[:, None]
        if SMOOTH:
            target += smoothing / CLASSES
        up = tl.load(up_ce_ptr + o_r * up_ce_step, mask=m_r, other=0.0).to(tl.float32)
        grad += (up * weight * ce_scale)[:, None] * (p_1 - target)
    # A row that does not count gets 0 even where its logits are no numbers.
    grad = tl.where(counts[:, None], grad, 0.0)
    o_g = _rows_at(o_r, inner, g_n, g_p, ALIGN)
    tl.store(
        g_ptr + o_g[:, None] + o_col[None, :] * g_c, grad.to(g_ptr.dtype.element_ty), mask=m_tile
    )
