"""A network as it was loaded, with what a recipe or its weight file says of its use."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from fastkd.config.section import Normalization

__all__ = ["LoadedNet"]


@dataclass(frozen=True)
class LoadedNet:
    """A teacher before it is bound to taps and views, or a student."""

    model: nn.Module
    normalization: Normalization | None = None
    """That its weights expect; None: that of the data."""
    resolution: int | None = None
    """Side in pixels of the images it wants; None: that of the views."""
    class_map: tuple[int, ...] | None = None
    """For every class of the data the network's output; None where the orders agree."""
    name: str = "teacher"
    """For messages."""
    precision: Literal["bf16", "fp16", "fp32"] | None = None
    """Autocast type of its forward pass; None: that of the run."""
    compiled: bool | None = None
    """Whether it is compiled; None: as the run."""
