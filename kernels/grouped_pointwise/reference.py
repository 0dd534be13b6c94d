"""The slow honest version of `grouped_pointwise`: its stages, and the chain of plain modules.

The stages are what op.py declares, in plain torch: computed in fp32 (fp64 for fp64), rounded to the
input's dtype where a kernel stores; statistics are those of what was stored. Kernels are tested
against them. `grouped_pointwise_reference` is the chain as nn.Conv2d and nn.BatchNorm2d compute it,
with torch's own autograd. It runs where no kernel does, and it gives second derivatives.

Batch norm: Ioffe & Szegedy 2015, arXiv:1502.03167. Over several processes its statistics are those
of all values of all ranks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from fastkd.kernels.grouped_pointwise.chain import Chain
from fastkd.kernels.grouped_pointwise.inputs import (
    After,
    Geometry,
    Norm,
    Normalised,
    activation_code,
)

__all__ = [
    "denormalise",
    "grouped",
    "grouped_backward",
    "grouped_pointwise_reference",
    "normalise",
    "normalise_backward",
    "pair",
    "pointwise",
    "pointwise_backward",
    "statistics",
    "update_running",
]

_POINTWISE = Geometry(stride=1, padding=0, dilation=1, groups=1)
_PIXELS = (0, 2, 3)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, [C]."""
    var, mean = torch.var_mean(x.double(), dim=_PIXELS, correction=0)
    return mean.to(_wide(x)), var.to(_wide(x))


def grouped(
    x: Tensor,
    norm: Sequence[Tensor],
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
    """Convolution of act(norm(x)) with `weight` [CO, C / groups, kh, kw]; (y, mean, var)."""
    geometry = Geometry(stride, padding, dilation, groups)
    return _stored(_conv(_activated(x, norm, eps, act), weight, bias, geometry), x, statistics)


def pointwise(
    x: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    act: int,
    weight: Tensor,
    bias: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`grouped` with a `weight` of [CO, C, 1, 1]."""
    return grouped(x, norm, eps, act, weight, bias, *_POINTWISE, statistics)


def pair(
    x: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    act: int,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    norm1: Sequence[Tensor],
    eps1: float,
    act1: int,
    weight1: Tensor,
    bias1: Tensor | None,
    norm2: Sequence[Tensor],
    eps2: float,
    act2: int,
    residual: Tensor | None,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """act2(norm2(pointwise(grouped(x)))) + residual; (out, mean, var)."""
    geometry = Geometry(stride, padding, dilation, groups)
    y, _, _ = grouped(x, norm, eps, act, weight, bias, *geometry, False)
    z = _conv(_activated(y, norm1, eps1, act1), weight1, bias1, _POINTWISE)
    out = _activated(z, norm2, eps2, act2)
    return _stored(out if residual is None else out + residual, x, statistics)


def normalise(
    x: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    act: int,
    residual: Tensor | None,
    activate_sum: bool,
) -> Tensor:
    """act(norm(x)) + residual, or act(norm(x) + residual) with `activate_sum`."""
    before, after = (residual, None) if activate_sum else (None, residual)
    out = _act(_plus(_norm(x, norm, eps), before), act)
    return _stored(_plus(out, after), x, False)[0]


def grouped_backward(
    g: Tensor,
    after: Sequence[Tensor],
    after_eps: float,
    x: Tensor,
    norm: Sequence[Tensor],
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
    """(gradient behind the norm of x, its sums, gradients of weight and bias)."""
    dy, wide = _through(g, after, after_eps), _wide(x)
    gx, sums, weight_grad, bias_grad = (x.new_empty(0, dtype=wide) for _ in range(4))
    gx = gx.to(x.dtype)
    inputs = _activated(x, norm, eps, act)
    grads: Any = torch.ops.aten.convolution_backward(
        dy,
        inputs,
        weight.to(wide),
        None,
        [stride, stride],
        [padding, padding],
        [dilation, dilation],
        False,
        [0, 0],
        groups,
        [needs[0], needs[1], False],
    )
    if needs[0]:
        gx, sums = _masked(grads[0], x, norm, _norm(x, norm, eps), eps, act)
    if needs[1]:
        weight_grad = grads[1].contiguous()
        bias_grad = dy.sum(_PIXELS) if has_bias else bias_grad
    return gx, sums, weight_grad, bias_grad


def pointwise_backward(
    g: Tensor,
    after: Sequence[Tensor],
    after_eps: float,
    x: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    act: int,
    weight: Tensor,
    has_bias: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`grouped_backward` with a `weight` of [CO, C, 1, 1]."""
    return grouped_backward(
        g, after, after_eps, x, norm, eps, act, weight, has_bias, *_POINTWISE, needs
    )


def normalise_backward(
    g: Tensor,
    x: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    act: int,
    residual: Tensor | None,
    activate_sum: bool,
) -> tuple[Tensor, Tensor]:
    """(gradient behind the norm of x, its sums)."""
    inputs = _plus(_norm(x, norm, eps), residual if activate_sum else None)
    return _masked(g.to(_wide(x)), x, norm, inputs, eps, act)


def denormalise(g: Tensor, after: Sequence[Tensor], after_eps: float) -> Tensor:
    """The derivative of a norm: the gradient at `after.out`."""
    return _stored(_through(g, after, after_eps), g, False)[0]


def grouped_pointwise_reference(
    x_NCHW: Tensor,
    chain: Chain,
    residual: Tensor | None,
    *,
    update: bool = True,
) -> Tensor:
    """The chain as plain modules compute it, in the dtype of `x_NCHW`: [N, CO, H', W'].

    `update`: update the running statistics of norms that train.
    """
    out = x_NCHW
    for stage in chain.stages:
        if stage.norm is not None:
            out = _act(_batch_norm(out, stage.norm, update), activation_code(stage.norm.activation))
        bias = None if stage.bias is None else stage.bias.to(out.dtype)
        stride, padding, dilation, groups = stage.geometry or _POINTWISE
        out = F.conv2d(out, stage.weight.to(out.dtype), bias, stride, padding, dilation, groups)
    if chain.after is None:
        return _plus(out, residual)
    out, act = _batch_norm(out, chain.after, update), activation_code(chain.after.activation)
    if chain.activate_sum:
        return _act(_plus(out, residual), act)
    return _plus(_act(out, act), residual)


def _batch_norm(x: Tensor, norm: Norm, update: bool) -> Tensor:
    """F.batch_norm, or that over all ranks."""
    if norm.training and norm.gather is not None:
        return _batch_norm_of_ranks(x, norm, norm.gather, update)
    keep = update or not norm.training
    mean, var = (norm.running_mean, norm.running_var) if keep else (None, None)
    # On a CPU all four vectors must have one dtype, x's or fp32.
    dtype = _wide(x) if mean is None else mean.dtype
    weight = None if norm.weight is None else norm.weight.to(dtype)
    bias = None if norm.bias is None else norm.bias.to(dtype)
    return F.batch_norm(x, mean, var, weight, bias, norm.training, norm.momentum, norm.eps)


def _batch_norm_of_ranks(
    x: Tensor, norm: Norm, gather: Callable[[Tensor], Tensor], update: bool
) -> Tensor:
    wide_x = x.to(_wide(x))
    num = wide_x.new_full((1,), x.numel() // x.shape[1])
    sums = _SumOfRanks.apply(torch.cat([num, wide_x.sum(_PIXELS)]), gather)
    num, mean = sums[0].detach(), sums[1:] / sums[0].detach()
    centred = wide_x - _per_channel(mean)
    var = _SumOfRanks.apply(centred.square().sum(_PIXELS), gather) / num
    if update:
        update_running(norm, mean.detach(), var.detach() * (num / (num - 1)))
    out = centred * _per_channel((var + norm.eps).rsqrt())
    if norm.weight is not None:
        out = out * _per_channel(norm.weight.to(out.dtype))
    if norm.bias is not None:
        out = out + _per_channel(norm.bias.to(out.dtype))
    return out.to(x.dtype)


def update_running(norm: Norm, mean: Tensor, unbiased_var: Tensor) -> None:
    """Move the running statistics towards those of a batch, as F.batch_norm does."""
    for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased_var)):
        if running is not None:
            running.mul_(1 - norm.momentum).add_(batch.to(running.dtype), alpha=norm.momentum)


class _SumOfRanks(torch.autograd.Function):
    """Sum of a vector over the ranks, in their order. Its gradient is the same sum."""

    @staticmethod
    @override
    def forward(ctx: Any, vector: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.gather = gather
        return gather(vector).sum(0)

    @staticmethod
    @override
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return _SumOfRanks.apply(upstream[0].contiguous(), ctx.gather), None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def _plus(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else x + residual


def _act(x: Tensor, act: int) -> Tensor:
    return (x, F.relu(x), F.relu6(x))[act] if act else x


def _xhat(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    invstd = (var.to(wide) + eps).rsqrt()
    return (x.to(wide) - _per_channel(mean.to(wide))) * _per_channel(invstd)


def _norm(x: Tensor, norm: Sequence[Tensor], eps: float) -> Tensor:
    """norm(x) in fp32 or fp64."""
    if not norm:
        return x.to(_wide(x))
    mean, var, weight, bias = Normalised(*norm)
    xhat = _xhat(x, mean, var, eps)
    return xhat * _per_channel(weight.to(xhat.dtype)) + _per_channel(bias.to(xhat.dtype))


def _activated(x: Tensor, norm: Sequence[Tensor], eps: float, act: int) -> Tensor:
    return _act(_norm(x, norm, eps), act)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    stride, padding, dilation, groups = geometry
    return F.conv2d(x, weight.to(x.dtype), bias, stride, padding, dilation, groups)


def _stored(value: Tensor, like: Tensor, count: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The value as a kernel stores it, in the dtype of `like`, and its statistics or nothing."""
    out = value.to(like.dtype).contiguous(memory_format=torch.channels_last)
    if count:
        return out, *statistics(out)
    return out, out.new_empty(0, dtype=_wide(out)), out.new_empty(0, dtype=_wide(out))


def _masked(
    g: Tensor, x: Tensor, norm: Sequence[Tensor], inputs: Tensor, eps: float, act: int
) -> tuple[Tensor, Tensor]:
    """(`g` where the activation of `inputs` lets it pass, as stored, and its sums)."""
    if act:
        passing = (inputs > 0) if act == 1 else (inputs > 0) & (inputs < 6)
        g = torch.where(passing, g, 0)
    out, sums, _ = _stored(g, x, False)
    if norm:
        wide = out.to(_wide(x))
        xhat = _xhat(x, norm[0], norm[1], eps)
        sums = torch.stack([wide.sum(_PIXELS), (wide * xhat).sum(_PIXELS)])
    return out, sums


def _through(g: Tensor, after: Sequence[Tensor], eps: float) -> Tensor:
    """The gradient at the stage's output, in fp32 or fp64."""
    wide = g.to(_wide(g))
    if not after:
        return wide
    out, mean, var, weight, mean_sums = After(*after)
    xhat = _xhat(out, mean, var, eps)
    mean_sums = mean_sums.to(wide.dtype)
    scale = weight.to(wide.dtype) * (var.to(wide.dtype) + eps).rsqrt()
    inner = wide - _per_channel(mean_sums[0]) - xhat * _per_channel(mean_sums[1])
    return _per_channel(scale) * inner
