"""Grouped 3x3 convolution, batch norm, activation and pointwise convolution as one chain.

Derivation, passes over memory and what is kept for the backward pass: README.md of this folder.
`reference.py` says the same in plain torch; `cpu.cpp` (through cpu.py) and `gpu.py` (Triton) are
what runs, stage by stage, in the order of `block.py`.
"""

from typing import Literal

import torch
from torch import Tensor

from fastkd.kernels._library import Impl, choose_for
from fastkd.kernels.grouped_pointwise.block import block
from fastkd.kernels.grouped_pointwise.chain import Chain, Stage
from fastkd.kernels.grouped_pointwise.checks import check_geometry, check_inputs
from fastkd.kernels.grouped_pointwise.inputs import Activation, Geometry, Norm
from fastkd.kernels.grouped_pointwise.memory import channels_last
from fastkd.kernels.grouped_pointwise.reference import grouped_pointwise_reference

__all__ = ["Activation", "Norm", "grouped_pointwise"]


def grouped_pointwise(
    x_NCHW: Tensor,
    grouped_weight: Tensor,
    pointwise_weight: Tensor,
    *,
    norm: Norm,
    groups: int,
    stride: int = 1,
    padding: int | None = None,
    dilation: int = 1,
    grouped_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    expand_weight: Tensor | None = None,
    expand_bias: Tensor | None = None,
    before: Norm | None = None,
    after: Norm | None = None,
    residual: Tensor | None = None,
    activate_sum: bool = False,
    recompute: Literal["auto", "on", "off"] = "auto",
    impl: Impl | None = None,
) -> Tensor:
    """`[expand 1x1] [-> before] -> grouped 3x3 -> norm -> pointwise [-> after] [+ residual]`.

    What nn.Conv2d, nn.BatchNorm2d and ReLU compute one after the other, with batch norm live in
    training: the G block of Moonshine (Crowley et al. 2018, arXiv:1711.02613), the inverted
    residual of MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381: expand, before, ReLU6, after
    without activation), and the pre-activation order (`before` in front of the 3x3). Nothing
    normalised is stored; the running statistics of norms that train are updated in place.

    Under autocast `x_NCHW` and `residual` are cast to its dtype; weights may stay fp32.

    Args:
        x_NCHW: [N, C, H, W], fp32, bf16, fp16 or fp64 (which takes the reference). Any layout;
            other than channels-last is copied once.
        grouped_weight: [C, C / groups, 3, 3], of x's dtype or fp32, as all weights and biases.
        pointwise_weight: [CO, C, 1, 1].
        norm: between the two.
        groups: of the 3x3 convolution, as are stride, padding (None: `dilation`) and dilation.
        grouped_bias, pointwise_bias: [C] and [CO].
        expand_weight, expand_bias: [C, C_in, 1, 1] and [C] of a pointwise convolution in front;
            x then has C_in channels.
        before: norm in front of the 3x3 convolution.
        after: norm of the result, before the residual.
        residual: added to the result, [N, CO, H', W'].
        activate_sum: the activation of `after` acts on the sum with the residual.
        recompute: "on" keeps the input of the 3x3 convolution for the backward pass and computes
            its output again there: less memory, more arithmetic. "auto" is "off".
        impl: None picks by device; "reference", "cpp", "triton" force one.

    Returns:
        [N, CO, H', W'] in x's dtype, channels-last. Differentiable; twice, and for several
        incoming gradients at once (is_grads_batched), through the reference.

    Raises:
        ValueError: wrong shapes, mixed dtypes or devices, an unknown activation, a norm that
            trains on one value per channel, or an impl that cannot run this.
    """
    geometry = Geometry(stride, dilation if padding is None else padding, dilation, groups)
    check_geometry(x_NCHW, grouped_weight, geometry)
    stages = (
        Stage("grouped", grouped_weight, grouped_bias, before, geometry),
        Stage("pointwise", pointwise_weight, pointwise_bias, norm, None),
    )
    if expand_weight is not None:
        stages = (Stage("expand", expand_weight, expand_bias, None, None), *stages)
    elif expand_bias is not None:
        raise ValueError("grouped_pointwise: expand_bias without expand_weight; give both or none")
    if recompute not in ("auto", "on", "off"):
        raise ValueError(f"grouped_pointwise: recompute={recompute!r} is none of auto, on, off")
    chain = Chain(stages, after, activate_sum)
    x_NCHW = _autocast(x_NCHW)
    residual = None if residual is None else _autocast(residual)
    check_inputs(x_NCHW, chain, residual)
    picked = choose_for("grouped_pointwise", [x_NCHW], impl)
    # A batch of no images leaves the kernels nothing to do, and fp64 they do not have.
    if picked == "reference" or x_NCHW.dtype == torch.float64 or x_NCHW.shape[0] == 0:
        if impl not in (None, "reference") and x_NCHW.dtype == torch.float64:
            raise ValueError(
                f"grouped_pointwise: impl={impl!r} takes fp32, bf16 and fp16, not fp64; use None"
            )
        return grouped_pointwise_reference(x_NCHW, chain, residual)
    return block(
        channels_last(x_NCHW),
        chain,
        None if residual is None else channels_last(residual),
        recompute=recompute == "on",
        source="triton" if impl == "triton" else "ops",
    )


def _autocast(x: Tensor) -> Tensor:
    """x as a convolution under autocast takes it."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))
