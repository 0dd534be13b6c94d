"""The stages without a convolution, and the merging of what programs counted.

Launches of gpu_norms.py; gpu.py hands the stages on.
"""

import torch
import triton
from torch import Tensor

from fastkd.kernels.gpu_kernels import launch
from fastkd.kernels.grouped_pointwise.gpu_memory import Tensors, after_vectors, pixels_of, vectors
from fastkd.kernels.grouped_pointwise.gpu_norms import (
    denormalise_kernel,
    moments_kernel,
    normalise_backward_kernel,
    normalise_kernel,
    statistics_kernel,
)
from fastkd.kernels.grouped_pointwise.gpu_table import shares, table_for, walk_tile
from fastkd.kernels.grouped_pointwise.gpu_weights import reduce_kernel
from fastkd.kernels.grouped_pointwise.memory import channels_last, empty, fp32

__all__ = [
    "activated_copy",
    "denormalise",
    "moments",
    "normalise",
    "normalise_backward",
    "statistics",
    "total",
]


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel."""
    x, channels, pixels = channels_last(x), x.shape[1], pixels_of(x)
    block_p, block_n, warps = walk_tile(table_for(x), channels)
    tiles = triton.cdiv(channels, block_n)
    share, programs = shares(pixels, block_p, tiles, table_for(x))
    partial = fp32(x, programs, 3, channels)
    launch(
        statistics_kernel,
        (programs * tiles,),
        on=x,
        x_ptr=x,
        partial_ptr=partial,
        pixels=pixels,
        share=share,
        C=channels,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        num_warps=warps,
    )
    return moments(partial)


def normalise(
    x: Tensor,
    norm: Tensors,
    eps: float,
    act: int,
    residual: Tensor | None,
    activate_sum: bool,
) -> Tensor:
    """act(norm(x)) + residual, or act(norm(x) + residual) with `activate_sum`."""
    x, channels, pixels = channels_last(x), x.shape[1], pixels_of(x)
    block_p, block_n, warps = walk_tile(table_for(x), channels)
    y = empty(x, *x.shape[1:])
    launch(
        normalise_kernel,
        (triton.cdiv(pixels, block_p) * triton.cdiv(channels, block_n),),
        on=x,
        x_ptr=x,
        norm=vectors(norm),
        eps=float(eps),
        residual_ptr=None if residual is None else channels_last(residual),
        y_ptr=y,
        pixels=pixels,
        SUM_ACTIVATED=activate_sum,
        ACT=act,
        C=channels,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        num_warps=warps,
    )
    return y


def normalise_backward(
    g: Tensor,
    x: Tensor,
    norm: Tensors,
    eps: float,
    act: int,
    residual: Tensor | None,
    activate_sum: bool,
) -> tuple[Tensor, Tensor]:
    """(gradient behind the norm of x, its sums)."""
    x, channels, pixels = channels_last(x), x.shape[1], pixels_of(x)
    block_p, block_n, warps = walk_tile(table_for(x), channels)
    tiles = triton.cdiv(channels, block_n)
    share, programs = shares(pixels, block_p, tiles, table_for(x))
    gx, sums = empty(x, *x.shape[1:]), fp32(x, programs, 2 if norm else 0, channels)
    launch(
        normalise_backward_kernel,
        (programs * tiles,),
        on=x,
        g_ptr=channels_last(g),
        x_ptr=x,
        norm=vectors(norm),
        eps=float(eps),
        residual_ptr=channels_last(residual) if residual is not None and activate_sum else None,
        y_ptr=gx,
        partial_ptr=sums if norm else None,
        pixels=pixels,
        share=share,
        ACT=act,
        C=channels,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        num_warps=warps,
    )
    return gx, total(sums) if norm else fp32(x, 0)


def denormalise(g: Tensor, after: Tensors, after_eps: float) -> Tensor:
    """The derivative of a norm: the gradient at `after.out`."""
    g, channels, pixels = channels_last(g), g.shape[1], pixels_of(g)
    if not after:
        return g.clone(memory_format=torch.channels_last)
    block_p, block_n, warps = walk_tile(table_for(g), channels)
    y = empty(g, *g.shape[1:])
    launch(
        denormalise_kernel,
        (triton.cdiv(pixels, block_p) * triton.cdiv(channels, block_n),),
        on=g,
        g_ptr=g,
        after=after_vectors(after),
        after_eps=float(after_eps),
        y_ptr=y,
        pixels=pixels,
        C=channels,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        num_warps=warps,
    )
    return y


def activated_copy(x: Tensor, norm: Tensors, eps: float, act: int) -> Tensor:
    """act(norm(x)) in memory, or x where there is neither."""
    return normalise(x, norm, eps, act, None, False) if norm or act else channels_last(x)


def moments(partial: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance from the moments of all programs [programs, 3, C]; empty without any."""
    parts, planes, channels = partial.shape
    if planes == 0:
        return fp32(partial, 0), fp32(partial, 0)
    mean, var = fp32(partial, channels), fp32(partial, channels)
    block_p, block_n = _parts_tile(parts, channels)
    launch(
        moments_kernel,
        (triton.cdiv(channels, block_n),),
        on=partial,
        partial_ptr=partial,
        mean_ptr=mean,
        var_ptr=var,
        parts=parts,
        C=channels,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return mean, var


def total(partial: Tensor) -> Tensor:
    """The sum over the programs [programs, ...], in their order."""
    if len(partial) == 1 or partial.numel() == 0:
        return partial[0]
    out = fp32(partial, *partial.shape[1:])
    block_p, block_n = _parts_tile(len(partial), out.numel())
    launch(
        reduce_kernel,
        (triton.cdiv(out.numel(), block_n),),
        on=partial,
        parts_ptr=partial,
        out_ptr=out,
        parts=len(partial),
        length=out.numel(),
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return out


def _parts_tile(parts: int, length: int) -> tuple[int, int]:
    """Few programs read many parts: tall tiles, whose loads are all on their way at once."""
    block_n = 8 if length <= 2048 else 32
    return min(2048 // block_n, triton.next_power_of_2(parts)), block_n
