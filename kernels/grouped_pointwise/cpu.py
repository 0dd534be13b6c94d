"""The stages of `grouped_pointwise` on CPU tensors through the C++ core: arguments and calls.

One function per stage of op.py, which says what they take and return. Packed arguments: `BlockArgs`
in args.h.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.kernels._library import STORAGE, Arguments, entry_point
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


def _norm_fields(name: str) -> dict[str, str]:
    vectors = {f"{name}_{part}": "P" for part in ("mean", "var", "weight", "bias")}
    return {**vectors, f"{name}_eps": "d", f"{name}_act": "q"}


_BLOCK = Arguments(
    g="P",
    out="P",
    out_mean="P",
    out_var="P",
    out_weight="P",
    mean_sums="P",
    out_eps="d",
    x="P",
    **_norm_fields("norm"),
    weight="P",
    bias="P",
    **_norm_fields("norm1"),
    weight1="P",
    bias1="P",
    **_norm_fields("norm2"),
    residual="P",
    y="P",
    mean="P",
    var="P",
    sums="P",
    dweight="P",
    dbias="P",
    type="q",
    samples="q",
    channels="q",
    height="q",
    width="q",
    out_channels="q",
    out_height="q",
    out_width="q",
    stride="q",
    padding="q",
    dilation="q",
    groups="q",
    activate_sum="q",
    threads="q",
)
# What a stage is not given is null or 0.
_ABSENT: dict[str, Any] = {name: None if kind == "P" else 0 for name, kind in _BLOCK.fields.items()}


def statistics(x: Tensor, isa: str | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, fp32 [C]."""
    x = channels_last(x)
    mean, var = _pair_of_vectors(x, x.shape[1])
    _run("statistics", isa, _layout(x), x=x, mean=mean, var=var)
    return mean, var


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
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The 3x3 convolution of act(norm(x)), and the statistics of what it wrote."""
    geometry = Geometry(stride, padding, dilation, groups)
    fields = _given_norm("norm", norm, eps, act) | _given_weight("", weight, bias)
    y = empty(x, x.shape[1], *map(geometry.out_size, x.shape[2:]))
    return _convolve("grouped", x, y, geometry, statistics, isa, fields)


def pointwise(
    x: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    act: int,
    weight: Tensor,
    bias: Tensor | None,
    statistics: bool,
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The 1x1 convolution of act(norm(x)), and the statistics of what it wrote."""
    fields = _given_norm("norm", norm, eps, act) | _given_weight("", weight, bias)
    y = empty(x, len(weight), *x.shape[2:])
    return _convolve("pointwise", x, y, None, statistics, isa, fields)


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
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both, with nothing stored in between; the statistics are of the result."""
    geometry = Geometry(stride, padding, dilation, groups)
    fields = _given_norm("norm", norm, eps, act) | _given_weight("", weight, bias)
    fields |= _given_norm("norm1", norm1, eps1, act1) | _given_weight("1", weight1, bias1)
    fields |= _given_norm("norm2", norm2, eps2, act2) | _given_residual(residual)
    y = empty(x, len(weight1), *map(geometry.out_size, x.shape[2:]))
    return _convolve("pair", x, y, geometry, statistics, isa, fields)


def normalise(
    x: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    act: int,
    residual: Tensor | None,
    activate_sum: bool,
    isa: str | None = None,
) -> Tensor:
    """act(norm(x)) + residual, or act(norm(x) + residual)."""
    x = channels_last(x)
    y = torch.empty_like(x)
    fields = _given_norm("norm", norm, eps, act) | _given_residual(residual)
    _run("normalise", isa, _layout(x), **fields, x=x, y=y, activate_sum=activate_sum)
    return y


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
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients at the input (behind its norm), sums, of weight and bias."""
    geometry = Geometry(stride, padding, dilation, groups)
    outputs = _gradients(x, norm, weight, has_bias, needs)
    fields = _given_after(after, after_eps) | _given_norm("norm", norm, eps, act)
    _differentiate("grouped_backward", g, x, weight, geometry, isa, outputs, fields)
    return outputs


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
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients at the input (behind its norm), sums, of weight and bias."""
    outputs = _gradients(x, norm, weight, has_bias, needs)
    fields = _given_after(after, after_eps) | _given_norm("norm", norm, eps, act)
    _differentiate("pointwise_backward", g, x, weight, None, isa, outputs, fields)
    return outputs


def normalise_backward(
    g: Tensor,
    x: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    act: int,
    residual: Tensor | None,
    activate_sum: bool,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient behind the norm, and its sums."""
    g, x = channels_last(g), channels_last(x)
    y = torch.empty_like(x)
    sums = fp32(x, 2, x.shape[1]) if norm else fp32(x, 0)
    fields = _given_norm("norm", norm, eps, act) | _given_residual(residual)
    fields |= {"g": g, "x": x, "y": y, "sums": sums if norm else None}
    _run("normalise_backward", isa, _layout(x), **fields, activate_sum=activate_sum)
    return y, sums


def denormalise(
    g: Tensor, after: Sequence[Tensor], after_eps: float, isa: str | None = None
) -> Tensor:
    """The gradient in front of the norm that `after` describes."""
    g = channels_last(g)
    y = torch.empty_like(g)
    _run("denormalise", isa, _layout(g), **_given_after(after, after_eps), g=g, y=y)
    return y


def _convolve(
    stage: str,
    x: Tensor,
    y: Tensor,
    geometry: Geometry | None,
    statistics: bool,
    isa: str | None,
    fields: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a forward stage, which fills `y`; (y, mean, var)."""
    x = channels_last(x)
    mean, var = _pair_of_vectors(x, y.shape[1] if statistics else 0)
    counted = {"mean": mean, "var": var} if statistics else {}
    _run(stage, isa, _layout(x, y, geometry), **fields, **counted, x=x, y=y)
    return y, mean, var


def _differentiate(
    stage: str,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry | None,
    isa: str | None,
    outputs: tuple[Tensor, ...],
    fields: dict[str, Any],
) -> None:
    """Run a backward stage, which fills `outputs` of `_gradients`."""
    g, x = channels_last(g), channels_last(x)
    names = ("y", "sums", "dweight", "dbias")
    written = {name: one if one.numel() else None for name, one in zip(names, outputs, strict=True)}
    _run(stage, isa, _layout(x, g, geometry), **fields, **written, g=g, x=x, weight=weight.float())


def _run(stage: str, isa: str | None, layout: dict[str, int], **fields: Any) -> None:
    sizes = {name: layout[name] for name in ("samples", "channels", "out_height", "out_width")}
    if 0 in sizes.values():
        raise ValueError(f"grouped_pointwise: a stage was called with {sizes}; expected no zero")
    values = {**_ABSENT, **layout, **fields, "threads": torch.get_num_threads()}
    if entry_point(f"block_{stage}", _BLOCK, isa)(_BLOCK.pack(**values)) < 0:
        raise MemoryError(
            f"grouped_pointwise: no memory for the scratch of {layout['channels']} channels"
        )


def _pair_of_vectors(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    return fp32(x, channels), fp32(x, channels)


def _layout(x: Tensor, y: Tensor | None = None, geometry: Geometry | None = None) -> dict[str, int]:
    y = x if y is None else y
    samples, channels, height, width = x.shape
    return {
        "type": STORAGE[x.dtype],
        "samples": samples,
        "channels": channels,
        "height": height,
        "width": width,
        "out_channels": y.shape[1],
        "out_height": y.shape[2],
        "out_width": y.shape[3],
        **(geometry._asdict() if geometry is not None else {}),
    }


def _given_norm(name: str, norm: Sequence[Tensor], eps: float, act: int) -> dict[str, Any]:
    parts = (f"{name}_{part}" for part in ("mean", "var", "weight", "bias"))
    return {**dict(zip(parts, norm, strict=False)), f"{name}_eps": eps, f"{name}_act": act}


def _given_weight(place: str, weight: Tensor, bias: Tensor | None) -> dict[str, Any]:
    wide = None if bias is None else bias.float()
    return {f"weight{place}": weight.float(), f"bias{place}": wide}


def _given_residual(residual: Tensor | None) -> dict[str, Any]:
    return {"residual": None if residual is None else channels_last(residual)}


def _given_after(after: Sequence[Tensor], eps: float) -> dict[str, Any]:
    if not after:
        return {}
    out, mean, var, weight, mean_sums = after
    vectors = {"out_mean": mean, "out_var": var, "out_weight": weight, "mean_sums": mean_sums}
    return {"out": channels_last(out), **vectors, "out_eps": eps}


def _gradients(
    x: Tensor, norm: Sequence[Tensor], weight: Tensor, has_bias: bool, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where a backward stage writes: (gradient at the input, sums, of the weight, of the bias)."""
    gradient = torch.empty_like(x) if needs[0] else x.new_empty(0)
    sums = fp32(x, 2, x.shape[1]) if needs[0] and norm else fp32(x, 0)
    of_weight = fp32(x, *weight.shape) if needs[1] else fp32(x, 0)
    of_bias = fp32(x, weight.shape[0] if needs[1] and has_bias else 0)
    return gradient, sums, of_weight, of_bias
