"""The stages of `grouped_pointwise` as torch sees them: schemas, shapes without data, backends.

The ops have leading underscores and no autograd of their own: block.py brings it. In all of them

- activations are [N, C, H, W] in channels-last memory, fp32, bf16 or fp16, and so are the results;
- `norm` is empty or (mean, var, weight, bias), fp32 [C], of the stage's input, `eps` its epsilon
  and `act` the activation behind it: 0 none, 1 ReLU, 2 ReLU6; without a norm, `act` acts on the
  input;
- convolution weights (3x3: [C, C / groups, 3, 3], which keeps the number of channels; pointwise:
  [CO, C, 1, 1]) are fp32 or of the activations' dtype, contiguous; their gradients are fp32;
- `statistics`: also return mean and biased variance, fp32 [CO], of what was written (rounded as it
  was stored); without, they are empty;
- `after` is empty or (out, mean, var, weight, mean_sums) as `inputs.After`, `after_eps` its
  epsilon;
- a backward op returns the gradient behind the norm of its input, masked by the activation, in the
  activations' dtype; `sums` [2, C] fp32, the sums of it and of it times xhat (empty without a
  norm); and the gradients of weight and bias. `needs`: (input, weights); what is not needed is
  empty.

Results do not depend on the number of threads, and repeat bit for bit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.kernels._library import LIBRARY, attach
from fastkd.kernels.grouped_pointwise.inputs import Geometry

__all__ = ["STAGES", "stage_op"]

_TAGS = (torch.Tag.pt2_compliant_tag,)
_NORM = "Tensor[] norm, float eps, int act"
_GEOMETRY = "int stride, int padding, int dilation, int groups"
_AFTER = "Tensor[] after, float after_eps"

STAGES = {
    "statistics": "(Tensor x) -> (Tensor, Tensor)",
    "grouped": f"(Tensor x, {_NORM}, Tensor weight, Tensor? bias, {_GEOMETRY}, bool statistics)"
    " -> (Tensor, Tensor, Tensor)",
    "pointwise": f"(Tensor x, {_NORM}, Tensor weight, Tensor? bias, bool statistics)"
    " -> (Tensor, Tensor, Tensor)",
    # grouped -> norm1, act1 -> pointwise [-> norm2, act2] [+ residual]; what the grouped
    # convolution gives is not stored (but rounded as if it were). `statistics` are for a norm that
    # follows: with them, norm2 is empty and there is no residual.
    "pair": f"(Tensor x, {_NORM}, Tensor weight, Tensor? bias, {_GEOMETRY}, Tensor[] norm1, "
    "float eps1, int act1, Tensor weight1, Tensor? bias1, Tensor[] norm2, float eps2, int act2, "
    "Tensor? residual, bool statistics) -> (Tensor, Tensor, Tensor)",
    # act(norm(x)) + residual, or act(norm(x) + residual) with `activate_sum`.
    "normalise": f"(Tensor x, {_NORM}, Tensor? residual, bool activate_sum) -> Tensor",
    "grouped_backward": f"(Tensor g, {_AFTER}, Tensor x, {_NORM}, Tensor weight, bool has_bias, "
    f"{_GEOMETRY}, bool[2] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    "pointwise_backward": f"(Tensor g, {_AFTER}, Tensor x, {_NORM}, Tensor weight, bool has_bias, "
    "bool[2] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    # The gradient behind the norm, with its sums.
    "normalise_backward": f"(Tensor g, Tensor x, {_NORM}, Tensor? residual, bool activate_sum)"
    " -> (Tensor, Tensor)",
    # The derivative of a norm that no convolution reads through: `after` of inputs.After.
    "denormalise": f"(Tensor g, {_AFTER}) -> Tensor",
}
for _name, _signature in STAGES.items():
    LIBRARY.define(f"_block_{_name}{_signature}", tags=_TAGS)


def stage_op(name: str) -> Any:
    """The op of a stage."""
    return getattr(torch.ops.fastkd, f"_block_{name}").default


# The fakes take each op's arguments in the order of its schema.


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"fastkd::_block_{name}", lib=LIBRARY)


def _like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    size = (x.shape[0], channels, height, width)
    return x.new_empty(size).contiguous(memory_format=torch.channels_last)


def _convolved(x: Tensor, weight: Tensor, geometry: Geometry | None = None) -> Tensor:
    height, width = (geometry.out_size(size) if geometry else size for size in x.shape[2:])
    return _like(x, weight.shape[0], height, width)


def _counted(y: Tensor, statistics: bool) -> tuple[Tensor, Tensor, Tensor]:
    mean = y.new_empty(y.shape[1] if statistics else 0, dtype=torch.float32)
    return y, mean, torch.empty_like(mean)


def _gradients(
    x: Tensor, normed: bool, weight: Tensor, has_bias: bool, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def vector(*size: int) -> Tensor:
        return x.new_empty(size, dtype=torch.float32)

    return (
        _like(x, *x.shape[1:]) if needs[0] else x.new_empty(0),
        vector(2, x.shape[1]) if needs[0] and normed else vector(0),
        vector(*weight.shape) if needs[1] else vector(0),
        vector(weight.shape[0]) if needs[1] and has_bias else vector(0),
    )


@_fake("statistics")
def _statistics(x):
    return _counted(x, True)[1:]


@_fake("grouped")
def _grouped(x, norm, eps, act, weight, bias, *rest):
    return _counted(_convolved(x, weight, Geometry(*rest[:4])), rest[4])


@_fake("pointwise")
def _pointwise(x, norm, eps, act, weight, bias, statistics):
    return _counted(_convolved(x, weight), statistics)


@_fake("pair")
def _pair(x, norm, eps, act, weight, bias, stride, padding, dilation, groups, *rest):
    y = _convolved(x, weight, Geometry(stride, padding, dilation, groups))
    weight1, statistics = rest[3], rest[-1]
    return _counted(_convolved(y, weight1), statistics)


@_fake("normalise")
def _normalise(x, norm, eps, act, residual, activate_sum):
    return _like(x, *x.shape[1:])


@_fake("grouped_backward")
def _grouped_backward(g, after, after_eps, x, norm, eps, act, weight, has_bias, *rest):
    return _gradients(x, bool(norm), weight, has_bias, rest[-1])


@_fake("pointwise_backward")
def _pointwise_backward(g, after, after_eps, x, norm, eps, act, weight, has_bias, needs):
    return _gradients(x, bool(norm), weight, has_bias, needs)


@_fake("normalise_backward")
def _normalise_backward(g, x, norm, eps, act, residual, activate_sum):
    gx = _like(x, *x.shape[1:])
    return gx, gx.new_empty((2, x.shape[1]) if norm else (0,), dtype=torch.float32)


@_fake("denormalise")
def _denormalise(g, after, after_eps):
    return _like(g, *g.shape[1:])


attach("grouped_pointwise", "grouped_pointwise", {name: f"_block_{name}" for name in STAGES})
