"""Memory layout of images and feature maps: channels-last, except for one CPU library bug."""

import torch
from torch import nn

__all__ = ["memory_format"]


def memory_format(
    channels_last: bool, device: torch.device, model: nn.Module
) -> torch.memory_format:
    """The layout in which to train `model` on `device`."""
    if channels_last and not (device.type == "cpu" and any(map(_hangs, model.modules()))):
        return torch.channels_last
    return torch.contiguous_format


def _hangs(module: nn.Module) -> bool:
    """True for a layer whose weight gradient may hang on a CPU with AVX2.

    oneDNN's 1x1 weight-gradient kernel for strides above 1 sometimes loops forever when a
    channels-last input has fewer channels than a register has lanes (torch 2.15, in_channels 2, 3
    and 4 at stride 2; 8 and more, stride 1, 3x3 kernels and the contiguous layout are sound).
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels < 8
    )
