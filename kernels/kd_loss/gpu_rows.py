"""The parts of the Triton kernels of `kd_loss`: views of tensors, and walks over the classes.

A view is (pointer, offset of each row's first class, distance between classes); strides are
(sample, pixel, class). Names: see gpu_kernels.py.
"""

import triton
import triton.language as tl

from fastkd.kernels.gpu_kernels import LN2, LOG2E, kl_term, tile

__all__ = [
    "HARD",
    "PARTS",
    "SOFT",
    "counting",
    "elements",
    "exact_kl",
    "max_and_log_sum",
    "merged",
    "rows_at",
    "view_of",
    "walk",
    "weights_of",
]

# The kinds of labels, also `LabelKind` in args.h. 0: there are none.
HARD = tl.constexpr(1)
SOFT = tl.constexpr(2)
# How many numbers `walk` returns per row, and per part of a split row.
PARTS = tl.constexpr(11)


@triton.jit
def rows_at(o_r, inner, strides, ALIGN: tl.constexpr):
    """Offset of each row's first class.

    ALIGN 0: rows are the pixels of samples. Else classes are a row's only axis and rows start at
    multiples of ALIGN elements, which Triton cannot know of a stride like 1000 and needs for wide
    loads.
    """
    if ALIGN > 0:
        return tl.multiple_of(o_r.to(tl.int64) * strides[0], ALIGN)
    # 32-bit division keeps the lanes' contiguity visible; only the offset needs 64 bits.
    return (o_r // inner).to(tl.int64) * strides[0] + (o_r % inner).to(tl.int64) * strides[1]


@triton.jit
def view_of(ptr, o_r, inner, strides, ALIGN: tl.constexpr):
    """The rows o_r of a tensor as a view."""
    return ptr, rows_at(o_r, inner, strides, ALIGN), strides[2]


@triton.jit
def elements(view, o_col, m_tile):
    """[R, C] elements in fp32, 0 beyond the last class."""
    b = tl.load(view[0] + view[1][:, None] + o_col[None, :] * view[2], mask=m_tile, other=0.0)
    return b.to(tl.float32)


@triton.jit
def _logits(view, o_col, m_tile, m_col):
    """[R, C] logits in fp32, minus infinity beyond the last class."""
    return tile(view[0], view[1], o_col, view[2], m_tile, m_col)


@triton.jit
def _first_max(x, o_col, base):
    """Maximum over classes and the lowest class that has it, counted from `base`."""
    top = tl.max(x, 1)
    at = tl.min(tl.where(x == top[:, None], o_col[None, :], 1 << 30), 1)
    return top, at + base


@triton.jit
def walk(
    s,
    t,
    y,
    m_r,
    c_t,
    first,
    last,
    TEACHERS: tl.constexpr,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    PER_ROW: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Maxima and sums over the classes [first, last), and the last tiles of student and teacher.

    The maxima and sums are PARTS numbers: m, z, z_1 of the student; m, z and sum of e_t (x_t - x_s)
    of the first teacher; mass and dot of the labels before smoothing, sum of the student's logits;
    the most probable class of both. Sums are kept per lane and reduced once, after the walk.
    """
    BLOCK_R: tl.constexpr = m_r.shape[0]
    o_c = tl.arange(0, BLOCK_C)
    ms = tl.full([BLOCK_R], float("-inf"), tl.float32)
    mt = ms
    at_s = tl.zeros([BLOCK_R], tl.int32)
    at_t = at_s
    zs = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    z1, zt, gap, mass, dot, flat = zs, zs, zs, zs, zs, zs
    b_s, b_t = zs, zs
    for base in range(first, last, BLOCK_C):
        o_col = base + o_c
        m_col = o_col < CLASSES
        m_tile = m_r[:, None] & m_col[None, :]
        b_s = _logits(s, o_col, m_tile, m_col)
        if PER_ROW and TEACHERS > 0:
            top, at = _first_max(b_s, o_c, base)
            at_s = tl.where(top > ms, at, at_s)
        else:
            top = tl.max(b_s, 1)
        new = tl.maximum(ms, top)
        # The first block's old maximum is minus infinity: exp2(-inf) = 0 wipes only zeros.
        fade = tl.exp2((ms - new) * c_t)
        fade_1 = tl.exp2((ms - new) * LOG2E)
        ms = new
        x_s = b_s - ms[:, None]
        if TEACHERS > 0:
            zs = zs * fade[:, None] + tl.exp2(x_s * c_t)
            b_t = _logits(t, o_col, m_tile, m_col)
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
        if LABELS > 0:
            z1 = z1 * fade_1[:, None] + tl.exp2(x_s * LOG2E)
        if LABELS == SOFT:
            b_y = elements(y, o_col, m_tile)
            mass += b_y
            dot += tl.where(b_y != 0.0, b_y * b_s, 0.0)
        if SMOOTH:
            flat += tl.where(m_tile, b_s, 0.0)
    of_student = (ms, tl.sum(zs, 1), tl.sum(z1, 1))
    of_teacher = (mt, tl.sum(zt, 1), tl.sum(gap, 1))
    of_labels = (tl.sum(mass, 1), tl.sum(dot, 1), tl.sum(flat, 1))
    return of_student + of_teacher + of_labels + (at_s, at_t), (b_s, b_t)


@triton.jit
def merged(work_ptr, o_r, m_r, splits, c_t, SPLITS: tl.constexpr):
    """The PARTS numbers of whole rows, from their parts."""
    o_k = tl.arange(0, SPLITS)
    m_k = m_r[:, None] & (o_k < splits)[None, :]
    p_w = work_ptr + (o_r.to(tl.int64)[:, None] * splits + o_k[None, :]) * PARTS
    p_ms = tl.load(p_w, mask=m_k, other=float("-inf"))
    p_mt = tl.load(p_w + 3, mask=m_k, other=float("-inf"))
    ms, mt = tl.max(p_ms, 1), tl.max(p_mt, 1)
    fade_s = tl.exp2((p_ms - ms[:, None]) * c_t)
    fade_1 = tl.exp2((p_ms - ms[:, None]) * LOG2E)
    fade_t = tl.exp2((p_mt - mt[:, None]) * c_t)
    zs = tl.sum(fade_s * tl.load(p_w + 1, mask=m_k, other=0.0), 1)
    z1 = tl.sum(fade_1 * tl.load(p_w + 2, mask=m_k, other=0.0), 1)
    zt = tl.sum(fade_t * tl.load(p_w + 4, mask=m_k, other=0.0), 1)
    gap = tl.sum(fade_t * tl.load(p_w + 5, mask=m_k, other=0.0), 1)
    mass = tl.sum(tl.load(p_w + 6, mask=m_k, other=0.0), 1)
    dot = tl.sum(tl.load(p_w + 7, mask=m_k, other=0.0), 1)
    flat = tl.sum(tl.load(p_w + 8, mask=m_k, other=0.0), 1)
    # Of the parts that hold the maximum the first one, as classes go.
    p_at = tl.load(p_w + 9, mask=m_k, other=0.0)
    at_s = tl.min(tl.where(p_ms == ms[:, None], p_at, 1e9), 1).to(tl.int32)
    p_at = tl.load(p_w + 10, mask=m_k, other=0.0)
    at_t = tl.min(tl.where(p_mt == mt[:, None], p_at, 1e9), 1).to(tl.int32)
    return ms, zs, z1, mt, zt, gap, mass, dot, flat, at_s, at_t


@triton.jit
def max_and_log_sum(t, m_r, c_t, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr):
    """A teacher's row maxima, and log2 of the sums of its exponentials."""
    BLOCK_R: tl.constexpr = m_r.shape[0]
    o_c = tl.arange(0, BLOCK_C)
    mt = tl.full([BLOCK_R], float("-inf"), tl.float32)
    zt = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for base in range(0, CLASSES, BLOCK_C):
        o_col = base + o_c
        m_col = o_col < CLASSES
        b_t = _logits(t, o_col, m_r[:, None] & m_col[None, :], m_col)
        new = tl.maximum(mt, tl.max(b_t, 1))
        zt = zt * tl.exp2((mt - new) * c_t)[:, None] + tl.exp2((b_t - new[:, None]) * c_t)
        mt = new
    return mt, tl.log2(tl.sum(zt, 1))


@triton.jit
def exact_kl(
    student,
    teachers,
    tiles,
    m_r,
    c_t,
    TEACHERS: tl.constexpr,
    PER_ROW: tl.constexpr,
    ONE_TILE: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """KL without cancellation, and the teachers' most probable class: a second walk.

    student, and each of the teachers: (view, row maxima, log2 of sums). tiles: logits of student
    and first teacher from the first walk; with ONE_TILE there are no others.
    """
    BLOCK_R: tl.constexpr = m_r.shape[0]
    o_c = tl.arange(0, BLOCK_C)
    s, ms, l_s = student
    t, mt, l_t = teachers[0]
    b_s, b_t = tiles
    kl = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    best = tl.full([BLOCK_R], -1.0, tl.float32)
    at_t = tl.zeros([BLOCK_R], tl.int32)
    for base in range(0, CLASSES, BLOCK_C):
        o_col = base + o_c
        m_col = o_col < CLASSES
        m_tile = m_r[:, None] & m_col[None, :]
        if not ONE_TILE:
            b_s = _logits(s, o_col, m_tile, m_col)
            b_t = _logits(t, o_col, m_tile, m_col)
        x_s = tl.fma(b_s - ms[:, None], c_t, -l_s[:, None])
        x_t = tl.fma(b_t - mt[:, None], c_t, -l_t[:, None])
        p_s = tl.exp2(x_s)
        p_t = tl.exp2(x_t)
        if TEACHERS == 1:
            u = (x_t - x_s) * LN2
        else:
            for k in tl.static_range(1, TEACHERS):
                b = _logits(teachers[k][0], o_col, m_tile, m_col)
                x = tl.fma(b - teachers[k][1][:, None], c_t, -teachers[k][2][:, None])
                p_t += tl.exp2(x)
            p_t = p_t * (1.0 / TEACHERS)
            u = (tl.log2(p_t) - x_s) * LN2
            if PER_ROW:
                top, at = _first_max(p_t, o_c, base)
                at_t = tl.where(top > best, at, at_t)
                best = tl.maximum(best, top)
        # Where p_t is 0, u may be NaN.
        u = tl.where(p_t > 0.0, u, 0.0)
        kl += tl.where(m_tile, kl_term(p_t, p_s, u), 0.0)
    return tl.sum(kl, 1), at_t


@triton.jit
def counting(mask_ptr, o_r, m_r):
    """Rows that exist and are not masked."""
    if mask_ptr is not None:
        return m_r & (tl.load(mask_ptr + o_r, mask=m_r, other=0) != 0)
    return m_r


@triton.jit
def weights_of(w_ptr, o_r, m_r):
    """Weights of the rows, 1 if there are none."""
    if w_ptr is not None:
        return tl.load(w_ptr + o_r, mask=m_r, other=0.0).to(tl.float32)
    return tl.full([m_r.shape[0]], 1.0, tl.float32)
