"""Parameters and multiply-accumulates of any network, by torch's own operator counter.

Used by the report, by `fastkd models` and by whoever wants to compare a student with its teacher.
One multiply-accumulate is one multiplication with its addition; biases, batch norm, activations,
pooling and additions count nothing, which is the rule of the distillation papers (oracle: their
tables).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["Count", "count"]


@dataclass(frozen=True, slots=True)
class Count:
    """Size and cost of a network; `str()` gives one readable line."""

    params: int
    """All parameters, each shared one once."""
    params_conv_linear: int
    """Weights and biases of convolutions and linear layers only: the papers' count."""
    macs: int
    """Multiply-accumulates of the forward pass of one image."""

    def __str__(self) -> str:
        return (
            f"{self.params:,} parameters ({self.params_conv_linear:,} in convolutions and linear "
            f"layers), {_short(self.macs)} multiply-accumulates per image"
        )


def count(model: nn.Module, input_shape: Sequence[int] = (3, 32, 32)) -> Count:
    """Count by one forward pass of a zero image of `input_shape` (C, H, W) in evaluation mode.

    The pass runs on the model's device without gradients. The training flag of every submodule is
    put back afterwards and no running statistic moves. An error of the network (an image too small,
    a wrong number of channels) comes through as it is.
    """
    # Imported here because this module of torch imports Triton where it is installed.
    from torch.utils.flop_counter import FlopCounterMode

    first = next(model.parameters(), None)
    image_NCHW = torch.zeros(
        (1, *input_shape),
        device=None if first is None else first.device,
        dtype=None if first is None or not first.is_floating_point() else first.dtype,
    )
    training = {module: module.training for module in model.modules()}
    # Attention's fused inference path is one operator of which the counter knows nothing.
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    counter = FlopCounterMode(display=False)
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        with torch.no_grad(), counter:
            model(image_NCHW)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        for module, flag in training.items():
            module.training = flag
    conv_linear = {
        parameter
        for module in model.modules()
        if isinstance(module, (_ConvNd, nn.Linear))
        for parameter in module.parameters(recurse=False)
    }
    return Count(
        params=sum(parameter.numel() for parameter in model.parameters()),
        params_conv_linear=sum(parameter.numel() for parameter in conv_linear),
        macs=counter.get_total_flops() // 2,
    )


def _short(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)
