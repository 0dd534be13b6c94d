"""What `grouped_pointwise` refuses: one sentence with what was got and what was expected."""

import torch
from torch import Tensor

from fastkd.kernels.grouped_pointwise.chain import Chain, Stage
from fastkd.kernels.grouped_pointwise.inputs import Geometry, Norm, activation_code

__all__ = ["check_geometry", "check_inputs"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_geometry(x_NCHW: Tensor, weight: Tensor, geometry: Geometry) -> None:
    """Raise ValueError unless a 3x3 convolution with `weight` [C, ...] can be laid out so."""
    if x_NCHW.dim() != 4 or x_NCHW.dtype not in _DTYPES:
        raise ValueError(
            f"grouped_pointwise: x is {list(x_NCHW.shape)} {x_NCHW.dtype}; expected [N, C, H, W] "
            f"of {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}"
        )
    if min(geometry.stride, geometry.dilation, geometry.groups) < 1 or geometry.padding < 0:
        raise ValueError(
            f"grouped_pointwise: {geometry}; expected stride, dilation and groups of at least 1 "
            "and padding of at least 0"
        )
    if weight.dim() != 4 or weight.shape[0] % geometry.groups:
        raise ValueError(
            f"grouped_pointwise: grouped_weight is {list(weight.shape)}, and its first size is not "
            f"a multiple of groups={geometry.groups}; expected [C, C / groups, 3, 3]"
        )
    sizes = x_NCHW.shape[2:]
    if min(sizes) < 1 or min(map(geometry.out_size, sizes)) < 1:
        raise ValueError(
            f"grouped_pointwise: images of {list(sizes)} leave no pixel with {geometry}; give "
            "larger ones, or more padding"
        )


def check_inputs(x_NCHW: Tensor, chain: Chain, residual: Tensor | None) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit; the geometry has been checked."""
    num, channels, height, width = x_NCHW.shape
    names = {"grouped": "before", "pointwise": "norm"}
    for stage in chain.stages:
        if stage.norm is not None:
            _check_norm(names[stage.name], stage.norm, channels, x_NCHW, num * height * width)
        channels = _check_convolution(stage, channels, x_NCHW)
        if stage.geometry is not None:
            height, width = map(stage.geometry.out_size, (height, width))
    if chain.after is not None:
        _check_norm("after", chain.after, channels, x_NCHW, num * height * width)
    elif chain.activate_sum:
        raise ValueError(
            "grouped_pointwise: activate_sum=True without `after`, whose activation it moves; give "
            "after, or activate_sum=False"
        )
    if residual is None:
        return
    if residual.shape != (num, channels, height, width):
        raise ValueError(
            f"grouped_pointwise: residual is {list(residual.shape)}; expected the shape of the "
            f"result, {[num, channels, height, width]}"
        )
    if residual.dtype != x_NCHW.dtype:
        raise ValueError(
            f"grouped_pointwise: residual is {residual.dtype} and x {x_NCHW.dtype}; cast one"
        )
    _check_device("residual", residual, x_NCHW)


def _check_convolution(stage: Stage, channels: int, x: Tensor) -> int:
    """The number of channels behind it."""
    name, weight, bias = f"{stage.name}_weight", stage.weight, stage.bias
    if stage.geometry is None:
        fits = weight.dim() == 4 and weight.shape[1:] == (channels, 1, 1)
        wanted = f"[CO, {channels}, 1, 1]"
    else:
        wanted = [channels, channels // stage.geometry.groups, 3, 3]
        fits = weight.shape == tuple(wanted) and channels % stage.geometry.groups == 0
    if not fits:
        raise ValueError(
            f"grouped_pointwise: {name} is {list(weight.shape)}; expected {wanted} for the "
            f"{channels} channels in front of it"
            + (f" in {stage.geometry.groups} groups" if stage.geometry else "")
        )
    _check_vector(f"{stage.name}_bias", bias, weight.shape[0], x)
    allowed = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
    for what, tensor in ((name, weight), (f"{stage.name}_bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in allowed:
            raise ValueError(
                f"grouped_pointwise: {what} is {tensor.dtype} and x {x.dtype}; expected x's dtype "
                "(or float32 beside float16 and bfloat16)"
            )
        _check_device(what, tensor, x)
    return weight.shape[0]


def _check_norm(name: str, norm: Norm, channels: int, x: Tensor, values: int) -> None:
    activation_code(norm.activation)
    for field in ("weight", "bias", "running_mean", "running_var"):
        _check_vector(f"{field} of `{name}`", getattr(norm, field), channels, x)
    if not norm.training and (norm.running_mean is None or norm.running_var is None):
        raise ValueError(
            f"grouped_pointwise: `{name}` has training=False and no running statistics to "
            "normalise with; give running_mean and running_var, or training=True"
        )
    fewest = 2 if norm.gather is None else 1
    if norm.training and values < fewest:
        raise ValueError(
            f"grouped_pointwise: `{name}` is in training mode and has {values} values per channel; "
            f"expected at least {fewest}. Give a larger batch or larger images, or call eval()"
        )


def _check_vector(name: str, vector: Tensor | None, size: int, x: Tensor) -> None:
    if vector is None:
        return
    if vector.shape != (size,):
        raise ValueError(
            f"grouped_pointwise: {name} is {list(vector.shape)}; expected [{size}], one number per "
            "channel"
        )
    _check_device(name, vector, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(
            f"grouped_pointwise: {name} is on {tensor.device} and x on {x.device}; move one"
        )
