"""`mix` on CUDA tensors: layouts, constants and the launch of gpu_kernels.py.

Serves the op of this folder under the dispatcher's CUDA key, and CPU tensors under Triton's
interpreter. Block and warp choices come from `plan`, a pure function of shapes and dtypes: nothing
is asked of a device.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from fastkd.kernels.gpu_kernels import launch
from fastkd.kernels.mix.gpu_kernels import mix_kernel
from fastkd.kernels.mix.inputs import dense

__all__ = ["Plan", "mixed", "plan"]


class Plan(NamedTuple):
    """Neighbouring elements of a group, groups of a program, programs of a plane, warps."""

    vec: int
    groups: int
    programs: int
    warps: int


def plan(height: int, row: int, source_bytes: int, result_bytes: int) -> Plan:
    """Tile for planes of `height` rows of `row` elements, which take so many bytes each."""
    # A group fills a 16-byte access of the narrower side where the rows allow it.
    vec = math.gcd(row, 16 // min(source_bytes, result_bytes))
    groups_of_plane = height * row // vec
    # Large images: enough elements per thread to hide the work done once per program.
    elements = 4096 if height * row >= 16384 else 2048
    groups = min(elements // vec, triton.next_power_of_2(groups_of_plane))
    return Plan(vec, groups, triton.cdiv(groups_of_plane, groups), 4)


def mixed(
    images: Tensor,
    index: Tensor | None,
    partners: Tensor | None,
    boxes: Tensor | None,
    lam: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Mixed images, see `fastkd.kernels.mix`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=layout)
    if out.numel() == 0:
        return out
    images, partners, source_last = dense(images, partners)
    index, boxes, lam = (None if x is None else x.contiguous() for x in (index, boxes, lam))
    num, channels, height, width = images.shape
    near = channels if channels_last else 1
    p = plan(height, width * near, images.element_size(), out.element_size())
    nothing = (0.0,) * channels
    normalize, means, stds, rest = "", nothing, nothing, nothing
    if mean:
        normalize, means, stds = "divide", tuple(mean), tuple(std)
        inverse = proven_inverse(means, stds) if images.dtype == torch.uint8 else None
        if inverse is not None:
            normalize = "multiply"
            stds, rest = inverse
    # An index goes into the images.
    partners = partners if index is None else images
    launch(
        mix_kernel,
        (p.programs * num * (channels // near),),
        on=images,
        images_ptr=images,
        partners_ptr=partners,
        index_ptr=index,
        boxes_ptr=boxes,
        lam_ptr=lam,
        out_ptr=out,
        mean=means,
        std=stds,
        rest=rest,
        num=num,
        box_step=4 if boxes is not None and boxes.dim() == 2 else 0,
        lam_step=1 if lam is not None and lam.dim() == 1 else 0,
        NORMALIZE=normalize,
        SOURCE_LAST=source_last,
        TARGET_LAST=channels_last,
        C=channels,
        H=height,
        W=width,
        VEC=p.vec,
        GROUPS=p.groups,
        num_warps=p.warps,
        # Fused multiply-adds only where they are written: the bits are those of torch.
        enable_fp_fusion=False,
    )
    return out


@cache
def proven_inverse(
    mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """1 / std as the sum of two fp32 numbers, if multiplying with it gives the bits of dividing.

    fma(x, high, x * low) is the correctly rounded quotient for nearly all numbers (Brisebarre,
    Muller and Raina 2004, "Accelerating correctly rounded floating-point division when the divisor
    is known in advance"); here all 256 bytes of each channel are tried, and None says that one
    failed. The fma is exact: its product and sum fit float64.
    """
    mean_C, std_C = (np.array(values, np.float32)[:, None] for values in (mean, std))
    high = (1 / std_C.astype(np.float64)).astype(np.float32)
    low = (1 / std_C.astype(np.float64) - high).astype(np.float32)
    centred = np.arange(256, dtype=np.float32) * np.float32(1 / 255) - mean_C
    product = (centred.astype(np.float64) * high + centred * low).astype(np.float32)
    if (product != centred / std_C).any():
        return None
    return tuple(high[:, 0].tolist()), tuple(low[:, 0].tolist())
