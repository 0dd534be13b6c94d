"""Where the tensors of a run live, and in which type and memory layout.

Made once, when the world is open and `precision=auto` is decided; loaders, teachers and trainer
read it.
"""

from dataclasses import dataclass

import torch
from torch import nn

from fastkd.compute.layout import memory_format
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World

__all__ = ["Placement"]


@dataclass(frozen=True)
class Placement:
    """Ranks and device, autocast type, memory layout of images and feature maps."""

    world: World
    precision: Precision
    channels_last: bool = True
    foreign: bool = False
    """Whether a network from outside the zoo sees the images, which then stay fp32
    (`fastkd.models.intake`)."""

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return self.world.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the images of a batch."""
        return torch.float32 if self.foreign else self.precision.dtype

    def layout(self, model: nn.Module) -> torch.memory_format:
        """Layout for `model` and its images; contiguous if a layer would hang in channels-last."""
        return memory_format(self.channels_last, self.device, model)
