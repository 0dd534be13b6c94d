"""The normalisation and activation that a foreign network uses, for the layers put into it.

Used by `models.rewrite`: a substitute's inner norm and activation are of the first kind that
follows the convolution it replaces, in the order in which the network registers its layers.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from fastkd.models.blocks.layers import Style

__all__ = ["StyleFinder"]

_ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Hardswish,
)
_TIMM_ACTIVATIONS = ("Swish", "Mish", "HardSwish", "HardMish", "GELU", "GELUTanh", "QuickGELU")
"""timm's own, without the sigmoids, which are attention gates rather than activations."""


class StyleFinder:
    """`finder.of(conv)` is the style around one convolution of the network."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = list(model.modules())
        self.position = {layer: number for number, layer in enumerate(self.layers)}

    def of(self, conv: nn.Conv2d) -> Style:
        """Norm and activation of the nearest kind after `conv`, else before it.

        A network whose normalisation cannot be built again gets none; one that calls its
        activation as a function gets the papers' ReLU.
        """
        norm, activation = self._near(conv, _norm_maker), self._near(conv, _activation_maker)
        return Style(norm) if activation is None else Style(norm, activation)

    def _near(
        self, conv: nn.Conv2d, maker: Callable[[nn.Module], Callable[[int], nn.Module] | None]
    ) -> Callable[[int], nn.Module] | None:
        at = self.position[conv]
        for layer in (*self.layers[at + 1 :], *reversed(self.layers[:at])):
            make = maker(layer)
            if make is not None:
                return make
        return None


def _norm_maker(layer: nn.Module) -> Callable[[int], nn.Module] | None:
    """A function channels -> new norm of the kind of `layer`, or None if it is not a norm."""
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        # A subclass (timm's norm with an activation in it) is replaced by the norm alone.
        kind = nn.SyncBatchNorm if isinstance(layer, nn.SyncBatchNorm) else nn.BatchNorm2d
        names = ("eps", "momentum", "affine", "track_running_stats")
        options: dict[str, Any] = {name: getattr(layer, name) for name in names}
        return lambda channels: kind(channels, **options)
    if isinstance(layer, nn.GroupNorm):
        groups, eps = layer.num_groups, layer.eps
        # As many channels per group as in the network, if they divide.
        return lambda channels: nn.GroupNorm(math.gcd(groups, channels), channels, eps)
    if isinstance(layer, nn.InstanceNorm2d):
        eps, affine = layer.eps, layer.affine
        return lambda channels: nn.InstanceNorm2d(channels, eps, affine=affine)
    if isinstance(layer, nn.LayerNorm):
        eps = layer.eps
        return lambda channels: _channel_norm(channels, eps)
    return None


def _channel_norm(channels: int, eps: float) -> nn.Module:
    """Layer norm over the channels of [N, C, H, W], wherever the network puts its channels."""
    from timm.layers.norm import LayerNorm2d

    return LayerNorm2d(channels, eps=eps)


def _activation_maker(layer: nn.Module) -> Callable[[int], nn.Module] | None:
    """A function channels -> new activation of the kind of `layer`, or None if it is not one."""
    if isinstance(layer, nn.PReLU):
        each = layer.num_parameters > 1
        return lambda channels: nn.PReLU(channels if each else 1)
    named = type(layer).__name__.removesuffix("Me") in _TIMM_ACTIVATIONS
    from_timm = named and type(layer).__module__.startswith("timm.layers.activations")
    if type(layer) in _ACTIVATIONS or from_timm:
        return lambda channels: copy.deepcopy(layer)
    return None
