"""The Triton kernels of `kd_loss`, in the formulas and names of README.md; gpu.py launches them.

A program owns a tile of [BLOCK_R rows, BLOCK_C classes]. Rows that fit one tile are read once;
longer ones are walked with a running maximum; few and very long ones are split over programs
(`part_kernel`), and `forward_kernel` merges the parts.
The forward pass keeps four numbers per row and two per teacher (maxima, log2 of the sums, mass of
the target), so that the gradient is one elementwise pass.

Names: b_ block values, m_ masks, o_ offsets, p_ pointers; s student, t teacher, y labels; m maximum
of logits, z sum of exponentials, l its log2. Addresses are int64. A pointer is None where its
tensor is absent.
"""

import triton
import triton.language as tl

from fastkd.kernels.gpu_kernels import LN2, LOG2E, NEAR_EQUAL
from fastkd.kernels.kd_loss.gpu_rows import (
    HARD,
    PARTS,
    counting,
    elements,
    exact_kl,
    max_and_log_sum,
    merged,
    rows_at,
    view_of,
    walk,
    weights_of,
)

__all__ = ["forward_kernel", "gradient_kernel", "part_kernel", "reduce_kernel"]


@triton.jit
def part_kernel(
    s_ptr,  # [N, C] or [N, C, pixels] logits
    t_ptr,  # the same of one teacher
    y_ptr,  # the same of soft labels, else None
    work_ptr,  # [rows, splits, PARTS] fp32
    num_rows,
    inner,  # pixels of a sample
    s_strides,
    t_strides,
    y_strides,
    temperature,
    splits,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    PER_ROW: tl.constexpr,
    ALIGN: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Maxima and sums of each row over one of `splits` parts of its classes."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < num_rows
    s = view_of(s_ptr, o_r, inner, s_strides, ALIGN)
    t = view_of(t_ptr, o_r, inner, t_strides, ALIGN)
    y = view_of(y_ptr, o_r, inner, y_strides, ALIGN)
    length = tl.cdiv(tl.cdiv(CLASSES, splits), BLOCK_C) * BLOCK_C
    first = tl.program_id(1) * length
    last = tl.minimum(first + length, CLASSES)
    c_t = LOG2E / temperature
    parts, _ = walk(s, t, y, m_r, c_t, first, last, 1, LABELS, SMOOTH, PER_ROW, CLASSES, BLOCK_C)
    p_w = work_ptr + (o_r.to(tl.int64) * splits + tl.program_id(1)) * PARTS
    for i in tl.static_range(PARTS):
        tl.store(p_w + i, parts[i].to(tl.float32), mask=m_r)


@triton.jit
def forward_kernel(
    s_ptr,  # [N, C] or [N, C, pixels] logits
    t_ptrs,  # the same of each teacher, all with t_strides
    y_ptr,  # [rows] int64 or the same as s_ptr, or None
    w_ptr,  # [rows], or None
    mask_ptr,  # [rows] uint8, or None
    kd_ptr,  # [rows] fp32, or None: partial sums are wanted
    ce_ptr,  # [rows] fp32, or None
    agree_ptr,  # [rows] fp32, or None
    partial_ptr,  # [programs, 2] fp32: loss and rows that count, or None
    stats_ptr,  # [4 + 2 * TEACHERS, rows] fp32
    work_ptr,  # [rows, splits, PARTS] fp32 from part_kernel, or None: rows are not split
    num_rows,
    inner,  # pixels of a sample
    s_strides,
    t_strides,
    y_strides,
    temperature,
    smoothing,
    ignore_index,
    kd_weight,
    ce_weight,
    splits,
    TEACHERS: tl.constexpr,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    ALIGN: tl.constexpr,
    CLASSES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Losses of BLOCK_R rows, or their weighted sum, and the statistics that the gradient needs."""
    PER_ROW: tl.constexpr = kd_ptr is not None
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < num_rows
    c_t = LOG2E / temperature
    s = view_of(s_ptr, o_r, inner, s_strides, ALIGN)
    ts = ()
    for k in tl.static_range(TEACHERS):
        ts = ts + (view_of(t_ptrs[k], o_r, inner, t_strides, ALIGN),)

    # 1. Maxima and sums.
    if work_ptr is None:
        y = view_of(y_ptr, o_r, inner, y_strides, ALIGN)
        t = ts[0] if TEACHERS > 0 else s
        parts, tiles = walk(
            s, t, y, m_r, c_t, 0, CLASSES, TEACHERS, LABELS, SMOOTH, PER_ROW, CLASSES, BLOCK_C
        )
    else:
        parts = merged(work_ptr, o_r, m_r, splits, c_t, SPLITS)
        tiles = (tl.zeros([BLOCK_R, BLOCK_C], tl.float32), tl.zeros([BLOCK_R, BLOCK_C], tl.float32))
    ms, zs, z1, mt, zt, gap, mass, dot, flat, at_s, at_t = parts
    l_s, l_1, l_t = tl.log2(zs), tl.log2(z1), tl.log2(zt)

    # 2. KL. A second walk only where the plain difference would cancel, or for several teachers.
    student = (s, ms, l_s)
    teachers = ()
    if TEACHERS > 0:
        teachers = ((ts[0], mt, l_t),)
    for k in tl.static_range(1, TEACHERS):
        mt_k, l_t_k = max_and_log_sum(ts[k], m_r, c_t, CLASSES, BLOCK_C)
        teachers = teachers + ((ts[k], mt_k, l_t_k),)
    kl = tl.zeros([BLOCK_R], tl.float32)
    if TEACHERS == 1:
        kl = (gap / zt + (ms - mt)) / temperature - (l_t - l_s) * LN2
        low = m_r & (kl < NEAR_EQUAL)
        if tl.max(low.to(tl.int32), 0) > 0:
            exact, _ = exact_kl(
                student, teachers, tiles, m_r, c_t, TEACHERS, PER_ROW, ONE_TILE, CLASSES, BLOCK_C
            )
            kl = tl.where(low, exact, kl)
    if TEACHERS > 1:
        kl, at_t = exact_kl(
            student, teachers, tiles, m_r, c_t, TEACHERS, PER_ROW, ONE_TILE, CLASSES, BLOCK_C
        )

    # 3. Cross entropy: mass * log z_1 - sum of target * x.
    counts = counting(mask_ptr, o_r, m_r)
    ce = tl.zeros([BLOCK_R], tl.float32)
    if LABELS == HARD:
        mass = tl.full([BLOCK_R], 1.0, tl.float32)
        y_r = tl.load(y_ptr + o_r, mask=m_r, other=0)
        counts = counts & (y_r != ignore_index)
        known = counts & (y_r >= 0) & (y_r < CLASSES)
        b = tl.load(s_ptr + s[1] + y_r * s[2], mask=known, other=float("nan"))
        dot = b.to(tl.float32)
    if LABELS == 0:
        mass = tl.full([BLOCK_R], 1.0, tl.float32)
    else:
        if SMOOTH:
            label_share = 1.0 - smoothing
            dot = label_share * dot + (smoothing / CLASSES) * flat
            mass = label_share * mass + smoothing
        ce = mass * (l_1 * LN2) - (dot - mass * ms)

    # 4. Results and statistics.
    weight = weights_of(w_ptr, o_r, m_r)
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
    stats = (ms, l_s, l_1, mass)
    for k in tl.static_range(TEACHERS):
        stats = stats + (teachers[k][1], teachers[k][2])
    n_x = tl.cast(num_rows, tl.int64)
    for i in tl.static_range(4 + 2 * TEACHERS):
        tl.store(stats_ptr + o_r + i * n_x, stats[i], mask=m_r)


@triton.jit
def reduce_kernel(
    partial_ptr,  # [num_partials, 2] fp32
    loss_ptr,  # fp32
    divisor_ptr,  # fp32
    num_partials,
    BLOCK: tl.constexpr,
):
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
def _probability(view, o_col, m_tile, m_r, p_x, n_x, c_t):
    """softmax(x / T) from a row's maximum and log2 of its sum, which lie n_x apart."""
    b = elements(view, o_col, m_tile)
    top = tl.load(p_x, mask=m_r, other=0.0)
    log_z = tl.load(p_x + n_x, mask=m_r, other=0.0)
    return tl.exp2(tl.fma(b - top[:, None], c_t, -log_z[:, None]))


@triton.jit
def gradient_kernel(
    s_ptr,  # [N, C] or [N, C, pixels] logits
    t_ptrs,  # the same of each teacher, all with t_strides
    y_ptr,  # [rows] int64 or the same as s_ptr, or None
    w_ptr,  # [rows], or None
    mask_ptr,  # [rows] uint8, or None
    g_ptr,  # the gradient, of s_ptr's shape
    stats_ptr,  # [4 + 2 * TEACHERS, rows] fp32
    up_kd_ptr,  # [rows] or one number, or None: kd gives no gradient
    up_ce_ptr,  # likewise, for ce
    divisor_ptr,  # fp32, or None
    num_rows,
    inner,  # pixels of a sample
    s_strides,
    t_strides,
    y_strides,
    g_strides,
    temperature,
    smoothing,
    ignore_index,
    kd_scale,
    ce_scale,
    up_kd_step,  # 1: an upstream gradient per row, 0: one for all
    up_ce_step,
    TEACHERS: tl.constexpr,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    ALIGN: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of kd_factor * (p_s - p_t) + ce_factor * (mass * p_1 - target)."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_col = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_r = o_r < num_rows
    m_col = o_col < CLASSES
    m_tile = m_r[:, None] & m_col[None, :]
    c_t = LOG2E / temperature
    counts = counting(mask_ptr, o_r, m_r)
    weight = weights_of(w_ptr, o_r, m_r)
    if divisor_ptr is not None:
        weight = weight / tl.load(divisor_ptr)
    p_x = stats_ptr + o_r
    n_x = tl.cast(num_rows, tl.int64)
    b_s = elements(view_of(s_ptr, o_r, inner, s_strides, ALIGN), o_col, m_tile)
    x_s = b_s - tl.load(p_x, mask=m_r, other=0.0)[:, None]
    grad = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if up_kd_ptr is not None and TEACHERS > 0:
        l_s = tl.load(p_x + n_x, mask=m_r, other=0.0)
        # No product to contract: for equal logits the two have equal bits and give exactly 0.
        p_s = tl.exp2(tl.fma(x_s, c_t, -l_s[:, None]))
        t = view_of(t_ptrs[0], o_r, inner, t_strides, ALIGN)
        p_t = _probability(t, o_col, m_tile, m_r, p_x + 4 * n_x, n_x, c_t)
        for k in tl.static_range(1, TEACHERS):
            t = view_of(t_ptrs[k], o_r, inner, t_strides, ALIGN)
            p_t += _probability(t, o_col, m_tile, m_r, p_x + (4 + 2 * k) * n_x, n_x, c_t)
        if TEACHERS > 1:
            p_t = p_t * (1.0 / TEACHERS)
        up = tl.load(up_kd_ptr + o_r * up_kd_step, mask=m_r, other=0.0).to(tl.float32)
        kd_factor = up * weight * (kd_scale * temperature)
        grad = kd_factor[:, None] * (p_s - p_t)
    if LABELS == HARD:
        y_r = tl.load(y_ptr + o_r, mask=m_r, other=0)
        counts = counts & (y_r != ignore_index)
    if up_ce_ptr is not None and LABELS > 0:
        l_1 = tl.load(p_x + 2 * n_x, mask=m_r, other=0.0)
        p_1 = tl.exp2(tl.fma(x_s, LOG2E, -l_1[:, None]))
        label_share = 1.0 - smoothing
        if LABELS == HARD:
            target = tl.where(o_col[None, :] == y_r[:, None], label_share, 0.0)
        else:
            target = elements(view_of(y_ptr, o_r, inner, y_strides, ALIGN), o_col, m_tile)
            target = target * label_share
            p_1 = p_1 * tl.load(p_x + 3 * n_x, mask=m_r, other=0.0)[:, None]
        if SMOOTH:
            target += smoothing / CLASSES
        up = tl.load(up_ce_ptr + o_r * up_ce_step, mask=m_r, other=0.0).to(tl.float32)
        ce_factor = up * weight * ce_scale
        grad += ce_factor[:, None] * (p_1 - target)
    # A row that does not count gets 0 even where its logits are NaN.
    grad = tl.where(counts[:, None], grad, 0.0)
    o_g = rows_at(o_r, inner, g_strides, ALIGN)
    tl.store(
        g_ptr + o_g[:, None] + o_col[None, :] * g_strides[2],
        grad.to(g_ptr.dtype.element_ty),
        mask=m_tile,
    )
