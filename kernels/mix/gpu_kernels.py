"""The Triton kernel of `mix`; gpu.py launches it.

A program owns GROUPS groups of VEC neighbouring elements of one plane of the result (channels-last:
of one image). Whether a group is touched or covered by the box is decided once per group, so that
all loads stay whole vectors; the elements of a group on the box's edge are chosen afterwards.
Every operation is rounded on its own: the launch switches fused multiply-adds off.

Names: b_ block values, m_ masks, o_ offsets. Addresses of images are int64. A pointer is None where
its tensor is absent.
"""

import triton
import triton.language as tl

__all__ = ["mix_kernel"]


@triton.jit
def _per_channel(values, o_c, C: tl.constexpr):
    """values[o_c] of a tuple of C numbers."""
    found = tl.where(o_c == 0, values[0], values[C - 1])
    for channel in tl.static_range(1, C - 1):
        found = tl.where(o_c == channel, values[channel], found)
    return found


@triton.jit
def _along(values, o_c, o_v, C: tl.constexpr):
    """[GROUPS, VEC] numbers values[(o_c + o_v) % C], chosen per group: o_v is known beforehand."""
    found = _per_channel(values, o_c, C)[:, None]
    for step in tl.static_range(1, C):
        o_step = tl.where(o_c + step < C, o_c + step, o_c + step - C)
        found = tl.where(o_v % C == step, _per_channel(values, o_step, C)[:, None], found)
    return found


@triton.jit
def _loaded(pointers, m_g):
    """[GROUPS, VEC] elements, bytes as int32: choosing between single bytes takes more work."""
    b = tl.load(pointers, mask=m_g[:, None], other=0)
    if b.dtype == tl.uint8:
        b = b.to(tl.int32)
    return b


@triton.jit
def _normalized(b, b_mean, b_std, b_rest, NORMALIZE: tl.constexpr):
    """(b - mean) / std in fp32, of elements as loaded."""
    x = b.to(tl.float32)
    if b.dtype == tl.int32:
        x = x * 0.00392156862745098
    if NORMALIZE == "multiply":
        x = x - b_mean
        x = tl.fma(x, b_std, x * b_rest)
    if NORMALIZE == "divide":
        x = tl.div_rn(x - b_mean, b_std)
    return x


@triton.jit
def mix_kernel(
    images_ptr,  # [num, C, H, W]
    partners_ptr,  # the same, or None; images_ptr where there is an index
    index_ptr,  # [num], or None
    boxes_ptr,  # [4] or [num, 4]: y0, y1, x0, x1, or None: the whole image
    lam_ptr,  # no dimensions or [num], or None: 0
    out_ptr,  # [num, C, H, W]
    mean,  # a tuple of C numbers, as are std and rest
    std,
    rest,
    num,
    box_step,  # from one image to the next; 0: one for the batch
    lam_step,
    NORMALIZE: tl.constexpr,
    SOURCE_LAST: tl.constexpr,
    TARGET_LAST: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    VEC: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """SOURCE_LAST, TARGET_LAST: channels are the fastest axis of images and partners, of out.

    NORMALIZE "divide": by std. "multiply": std and rest are 1 / std in two parts. "": not at all.
    """
    # Elements of a pixel that are neighbours in the result, and groups in a row of pixels.
    NEAR: tl.constexpr = C if TARGET_LAST else 1
    PER_ROW: tl.constexpr = W * NEAR // VEC
    BLOCKS: tl.constexpr = (H * PER_ROW + GROUPS - 1) // GROUPS
    plane = tl.program_id(0) // BLOCKS
    o_n = plane // (C // NEAR)
    o_g = tl.program_id(0) % BLOCKS * GROUPS + tl.arange(0, GROUPS)
    m_g = o_g < H * PER_ROW
    o_y = o_g // PER_ROW
    # Where in its row of pixels a group begins.
    o_r = o_g % PER_ROW * VEC
    o_v = tl.arange(0, VEC)[None, :]

    o_out = (o_g * VEC)[:, None] + o_v
    if SOURCE_LAST == TARGET_LAST:
        o_in = o_out + plane % (C // NEAR) * (H * W)
    elif SOURCE_LAST:
        o_in = o_out * C + plane % C
    else:
        o_re = o_r[:, None] + o_v
        o_in = o_re % C * (H * W) + (o_y * W)[:, None] + o_re // C
    b_mean = 0.0
    b_std = 1.0
    b_rest = 0.0
    if NORMALIZE != "":
        if TARGET_LAST:
            b_mean = _along(mean, o_r % C, o_v, C)
            b_std = _along(std, o_r % C, o_v, C)
            b_rest = _along(rest, o_r % C, o_v, C)
        else:
            b_mean = _per_channel(mean, plane % C, C)
            b_std = _per_channel(std, plane % C, C)
            b_rest = _per_channel(rest, plane % C, C)

    # Elements [low, high) of a group are inside; as bits, one instruction tests an element.
    low = tl.zeros([GROUPS], tl.int32)
    high = low
    if boxes_ptr is not None:
        box = boxes_ptr + o_n * box_step
        m_y = (o_y >= tl.load(box)) & (o_y < tl.load(box + 1))
        # Boxes may reach beyond the image and beyond int32.
        x0 = (tl.minimum(tl.maximum(tl.load(box + 2), 0), W) * NEAR).to(tl.int32)
        x1 = (tl.minimum(tl.maximum(tl.load(box + 3), 0), W) * NEAR).to(tl.int32)
        low = tl.where(m_y, tl.minimum(tl.maximum(x0 - o_r, 0), VEC), VEC)
        high = tl.maximum(tl.minimum(x1 - o_r, VEC), low)
    elif partners_ptr is not None:
        high += VEC
    inside = (((1 << high) - (1 << low))[:, None] & (1 << o_v)) != 0

    start = o_n.to(tl.int64) * (C * H * W)
    # Vectors that are foreign altogether are not read.
    m_own = m_g if lam_ptr is not None else m_g & (high - low < VEC)
    b = _loaded(images_ptr + start + o_in, m_own)
    if partners_ptr is not None:
        o_p = o_n.to(tl.int64)
        if index_ptr is not None:
            o_p = tl.load(index_ptr + o_n).to(tl.int64)
        known = (o_p >= 0) & (o_p < num)
        o_p = tl.where(known, o_p, 0) * (C * H * W)
        b_p = _loaded(partners_ptr + o_p + o_in, m_g & (high > low))
        if lam_ptr is not None:
            x = _normalized(b, b_mean, b_std, b_rest, NORMALIZE)
            x_p = _normalized(b_p, b_mean, b_std, b_rest, NORMALIZE)
            lam = tl.load(lam_ptr + o_n * lam_step).to(tl.float32)
            # From the nearer of the two: exact at 0 and 1.
            near = lam < 0.5
            x_p = tl.where(near, x_p, x) + tl.where(near, lam, lam - 1.0) * (x - x_p)
            x = tl.where(inside, x_p, x)
        else:
            b = tl.where(inside, b_p, b)
            x = _normalized(b, b_mean, b_std, b_rest, NORMALIZE)
        # An index out of range reads no foreign memory, and shows as NaN.
        x = tl.where(known, x, float("nan"))
    else:
        x = _normalized(b, b_mean, b_std, b_rest, NORMALIZE)
        if boxes_ptr is not None:
            x = tl.where(inside, 0.0, x)
    out = out_ptr + plane.to(tl.int64) * (NEAR * H * W)
    tl.store(out + o_out, x.to(out_ptr.dtype.element_ty), mask=m_g[:, None])
