"""The stages of `grouped_pointwise` on CUDA tensors: layouts and launches of the gpu_*.py files.

One function per stage of op.py, which has their meaning; gpu_passes.py has those without a
convolution. They serve the dispatcher's CUDA key, and CPU tensors under Triton's interpreter.
Launch shapes come from gpu_table.py.

A grouped convolution behind a norm or an activation reads an activated copy: as a prologue these
would be done for each of the taps that read an element (and padding is 0 behind the activation),
which costs more than one more pass. Its gradient goes back through them in a pass of its own, too:
beside the taps their vectors and sums do not fit the registers.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastkd.kernels.gpu_kernels import launch
from fastkd.kernels.grouped_pointwise.gpu_kernels import gather_kernel, slide_kernel
from fastkd.kernels.grouped_pointwise.gpu_memory import (
    Tensors,
    after_vectors,
    pixels_of,
    sizes,
    vectors,
)
from fastkd.kernels.grouped_pointwise.gpu_pair import pair_kernel
from fastkd.kernels.grouped_pointwise.gpu_passes import (
    activated_copy,
    denormalise,
    moments,
    normalise,
    normalise_backward,
    statistics,
    total,
)
from fastkd.kernels.grouped_pointwise.gpu_pointwise import (
    pointwise_backward_kernel,
    pointwise_kernel,
)
from fastkd.kernels.grouped_pointwise.gpu_table import (
    by_width,
    conv_tile,
    matrix_tile,
    pair_fits,
    shares,
    strip_rows,
    strips,
    table_for,
)
from fastkd.kernels.grouped_pointwise.gpu_weights import (
    grouped_weight_kernel,
    pointwise_weight_kernel,
)
from fastkd.kernels.grouped_pointwise.inputs import Geometry
from fastkd.kernels.grouped_pointwise.memory import channels_last, empty, fp32

__all__ = [
    "denormalise",
    "grouped",
    "grouped_backward",
    "normalise",
    "normalise_backward",
    "pair",
    "pointwise",
    "pointwise_backward",
    "statistics",
]


def grouped(
    x: Tensor,
    norm: Tensors,
    eps: float,
    act: int,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolution of act(norm(x)) with `weight` [C, C / groups, 3, 3]; (y, mean, var)."""
    x = activated_copy(x, norm, eps, act)
    geometry = Geometry(stride, padding, dilation, groups)
    y = empty(x, x.shape[1], *map(geometry.out_size, x.shape[2:]))
    partial = _convolve(x, weight, bias, y, geometry, statistics=statistics)
    return y, *moments(partial)


def pointwise(
    x: Tensor,
    norm: Tensors,
    eps: float,
    act: int,
    weight: Tensor,
    bias: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Product of act(norm(x)) with `weight` [CO, C, 1, 1]; (y, mean, var)."""
    return _pointwise(x, norm, eps, act, weight, bias, [], 1.0, 0, None, statistics)


def pair(
    x: Tensor,
    norm: Tensors,
    eps: float,
    act: int,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    norm1: Tensors,
    eps1: float,
    act1: int,
    weight1: Tensor,
    bias1: Tensor | None,
    norm2: Tensors,
    eps2: float,
    act2: int,
    residual: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """act2(norm2(pointwise(act1(norm1(grouped(x)))))) + residual; (out, mean, var).

    One launch where gpu_table.pair_fits, else two with the result of the first in memory.
    """
    x = activated_copy(x, norm, eps, act)
    channels, out_channels = x.shape[1], weight1.shape[0]
    table, geometry = table_for(x), Geometry(stride, padding, dilation, groups)
    if not pair_fits(table, channels, out_channels, groups):
        y, _, _ = grouped(x, [], 1.0, 0, weight, bias, *geometry, False)
        behind = (norm2, eps2, act2, residual, statistics)
        return _pointwise(y, norm1, eps1, act1, weight1, bias1, *behind)
    tile = conv_tile(channels, groups, table.gather)
    out = empty(x, out_channels, *map(geometry.out_size, x.shape[2:]))
    walk = by_width(table.pair, max(channels, out_channels))
    shape = strip_rows(walk, table, 1, out, stride, dilation)
    programs = strips(out, dilation, shape)
    partial = fp32(x, programs, 3 if statistics else 0, out_channels)
    launch(
        pair_kernel,
        (programs,),
        on=x,
        x_ptr=x,
        weight_ptr=weight.contiguous(),
        bias_ptr=bias,
        norm1=vectors(norm1),
        eps1=float(eps1),
        weight1_ptr=weight1.contiguous(),
        bias1_ptr=bias1,
        norm2=vectors(norm2),
        eps2=float(eps2),
        residual_ptr=None if residual is None else channels_last(residual),
        y_ptr=out,
        partial_ptr=partial if statistics else None,
        **sizes(x, out),
        stride=stride,
        padding=padding,
        dilation=dilation,
        ACT1=act1,
        ACT2=act2,
        C=channels,
        CO=out_channels,
        CPG=channels // groups,
        SET=tile.used,
        PRECISION=_precision(),
        BLOCK_P=shape.columns,
        BLOCK_C=tile.block,
        BLOCK_N=max(16, triton.next_power_of_2(out_channels)),
        ROWS=shape.rows,
        num_warps=shape.warps,
        num_stages=1,
    )
    return out, *moments(partial)


def grouped_backward(
    g: Tensor,
    after: Tensors,
    after_eps: float,
    x: Tensor,
    norm: Tensors,
    eps: float,
    act: int,
    weight: Tensor,
    has_bias: bool,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gradient behind the norm of x, its sums, gradients of weight and bias).

    The kernel of the weight gradient also stores the gradient at the output, which costs it no
    reads; that of the data gradient then reads one tensor and not two.
    """
    x, g, geometry = channels_last(x), channels_last(g), Geometry(stride, padding, dilation, groups)
    gx, sums, dw, db = _nothing(x)
    table, channels = table_for(x), x.shape[1]
    tile = conv_tile(channels, groups, table.grouped_weight)
    if after and (tile.inputs > 1 or not needs[1]):
        g, after = denormalise(g, after, after_eps), []
    dy = g
    if needs[1]:
        inputs = activated_copy(x, norm, eps, act)
        dy = empty(g, *g.shape[1:]) if after and needs[0] else g
        block, warps = table.grouped_weight[tile.block]
        tiles = tile.tiles * tile.inputs
        share, programs = shares(pixels_of(g), block, tiles, table)
        dw = fp32(x, programs, *weight.shape)
        db = fp32(x, programs, channels if has_bias else 0)
        launch(
            grouped_weight_kernel,
            (programs * tiles,),
            on=x,
            g_ptr=g,
            after=after_vectors(after),
            after_eps=float(after_eps),
            dy_ptr=None if dy is g else dy,
            x_ptr=inputs,
            weight_ptr=dw,
            bias_ptr=db if has_bias else None,
            **sizes(x, g),
            stride=stride,
            padding=padding,
            dilation=dilation,
            share=share,
            C=channels,
            CPG=channels // groups,
            SET=tile.used,
            PRECISION=_precision(),
            BLOCK_P=block,
            BLOCK_C=tile.block,
            num_warps=warps,
            num_stages=1,
        )
        dw, db = total(dw), total(db)
    if needs[0]:
        gx = empty(x, *x.shape[1:])
        _convolve(dy, weight, None, gx, geometry, transposed=True)
        if norm or act:
            gx, sums = normalise_backward(gx, x, norm, eps, act, None, False)
    return gx, sums, dw, db


def pointwise_backward(
    g: Tensor,
    after: Tensors,
    after_eps: float,
    x: Tensor,
    norm: Tensors,
    eps: float,
    act: int,
    weight: Tensor,
    has_bias: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`grouped_backward` with a `weight` of [CO, C, 1, 1].

    Both gradients in one pass where the weights fit one tile, else in two, of which the first
    stores the gradient at the output for the second.
    """
    x, g = channels_last(x), channels_last(g)
    gx, sums, dw, db = _nothing(x)
    table, channels, out_channels, pixels = table_for(x), x.shape[1], len(weight), pixels_of(x)
    shape = table.pointwise_backward
    block_k, block_n = matrix_tile(shape, out_channels, channels)
    dz, fused = g, False
    if needs[0]:
        one_tile = out_channels <= block_k and channels <= block_n
        fused = needs[1] and one_tile and block_k * block_n <= table.fused_weights
        tiles = triton.cdiv(channels, block_n)
        programs = _programs(pixels, shape.pixels, tiles, table.programs)
        gx = empty(x, *x.shape[1:])
        sums = fp32(x, programs, 2 if norm else 0, channels)
        if fused:
            dw = fp32(x, programs, *weight.shape)
            db = fp32(x, programs, out_channels if has_bias else 0)
        elif needs[1] and after:
            dz = empty(g, *g.shape[1:])
        launch(
            pointwise_backward_kernel,
            (programs * tiles,),
            on=x,
            g_ptr=g,
            after=after_vectors(after),
            after_eps=float(after_eps),
            dz_ptr=None if dz is g else dz,
            x_ptr=x,
            norm=vectors(norm),
            eps=float(eps),
            weight_ptr=weight.contiguous(),
            y_ptr=gx,
            partial_ptr=sums if norm else None,
            dw_ptr=dw if fused else None,
            db_ptr=db if fused and has_bias else None,
            pixels=pixels,
            programs=programs,
            ACT=act,
            C=channels,
            CO=out_channels,
            PRECISION=_precision(),
            WARPS=shape.warps_along,
            BLOCK_P=shape.pixels,
            BLOCK_K=block_k,
            BLOCK_N=block_n,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
        sums = total(sums) if norm else fp32(x, 0)
        dw, db = (total(dw), total(db)) if fused else (dw, db)
    elif after:
        dz = denormalise(g, after, after_eps)
    if needs[1] and not fused:
        dw, db = _pointwise_weight(dz, x, norm, eps, act, weight, has_bias)
    return gx, sums, dw, db


def _pointwise(
    x: Tensor,
    norm: Tensors,
    eps: float,
    act: int,
    weight: Tensor,
    bias: Tensor | None,
    norm2: Tensors,
    eps2: float,
    act2: int,
    residual: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`pointwise`, and what `pair` does behind it."""
    x, channels, out_channels = channels_last(x), x.shape[1], len(weight)
    table, pixels = table_for(x), pixels_of(x)
    shape = by_width(table.pointwise, channels)
    block_k, block_n = matrix_tile(shape, channels, out_channels)
    tiles = triton.cdiv(out_channels, block_n)
    programs = _programs(pixels, shape.pixels, tiles, table.programs)
    y = empty(x, out_channels, *x.shape[2:])
    partial = fp32(x, programs, 3 if statistics else 0, out_channels)
    launch(
        pointwise_kernel,
        (programs * tiles,),
        on=x,
        x_ptr=x,
        norm=vectors(norm),
        eps=float(eps),
        weight_ptr=weight.contiguous(),
        bias_ptr=bias,
        norm2=vectors(norm2),
        eps2=float(eps2),
        residual_ptr=None if residual is None else channels_last(residual),
        y_ptr=y,
        partial_ptr=partial if statistics else None,
        pixels=pixels,
        programs=programs,
        ACT=act,
        ACT2=act2,
        C=channels,
        CO=out_channels,
        PRECISION=_precision(),
        WARPS=shape.warps_along,
        BLOCK_P=shape.pixels,
        BLOCK_K=block_k,
        BLOCK_N=block_n,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    return y, *moments(partial)


def _pointwise_weight(
    dz: Tensor, x: Tensor, norm: Tensors, eps: float, act: int, weight: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias from the gradient at the output."""
    channels, out_channels, table = x.shape[1], len(weight), table_for(x)
    shape = table.pointwise_weight
    block_k, block_n = matrix_tile(shape, out_channels, channels)
    tiles = triton.cdiv(out_channels, block_k) * triton.cdiv(channels, block_n)
    share, programs = shares(pixels_of(x), shape.pixels, tiles, table)
    dw = fp32(x, programs, *weight.shape)
    db = fp32(x, programs, out_channels if has_bias else 0)
    launch(
        pointwise_weight_kernel,
        (programs * tiles,),
        on=x,
        g_ptr=dz,
        x_ptr=x,
        norm=vectors(norm),
        eps=float(eps),
        weight_ptr=dw,
        bias_ptr=db if has_bias else None,
        pixels=pixels_of(x),
        share=share,
        ACT=act,
        C=channels,
        CO=out_channels,
        PRECISION=_precision(),
        BLOCK_P=shape.pixels,
        BLOCK_K=block_k,
        BLOCK_N=block_n,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    return total(dw), total(db)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    geometry: Geometry,
    *,
    statistics: bool = False,
    transposed: bool = False,
) -> Tensor:
    """Fill `y` with the grouped convolution of x, or its data gradient (`transposed`); moments.

    These are [programs, 3, C], [programs, 0, C] without `statistics`.
    """
    stride, padding, dilation, groups = geometry
    channels, table = x.shape[1], table_for(x)
    tile = conv_tile(channels, groups, table.gather)
    slides = tile.block in table.slide and tile.inputs == 1 and not (transposed and stride > 1)
    if slides:
        shape = strip_rows(table.slide[tile.block], table, tile.tiles, y, stride, dilation)
        columns, rows, warps = shape
        programs = strips(y, dilation, shape)
        # Mirrored, the kernel reaches as far beyond the image as the padding leaves of it.
        padding = 2 * dilation - padding if transposed else padding
        kernel: Any = slide_kernel
        own: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        own |= {"BLOCK_P": columns, "ROWS": rows}
    else:
        block, warps = table.gather[tile.block]
        step = stride if transposed else 1
        of_class = len(y) * triton.cdiv(y.shape[2], step) * triton.cdiv(y.shape[3], step)
        programs = step**2 * triton.cdiv(of_class, block)
        kernel = gather_kernel
        own = {"STRIDE": stride, "PADDING": padding, "DILATION": dilation, "BLOCK_P": block}
    partial = fp32(x, programs, 3 if statistics else 0, channels)
    launch(
        kernel,
        (programs * tile.tiles,),
        on=x,
        x_ptr=x,
        weight_ptr=weight.contiguous(),
        bias_ptr=bias,
        y_ptr=y,
        partial_ptr=partial if statistics else None,
        **sizes(x, y),
        **own,
        C=channels,
        CPG=channels // groups,
        SET=tile.used,
        TRANSPOSED=transposed,
        PRECISION=_precision(),
        BLOCK_C=tile.block,
        num_warps=warps,
        num_stages=1,
    )
    return partial


def _nothing(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Results of a backward stage that are not needed."""
    return x.new_empty(0), fp32(x, 0), fp32(x, 0), fp32(x, 0)


def _programs(pixels: int, block: int, tiles: int, most: int) -> int:
    """Programs per tile of channels that walk over blocks of pixels."""
    return min(triton.cdiv(pixels, block), max(1, most // tiles))


def _precision() -> str:
    """How products of fp32 matrices are rounded."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
