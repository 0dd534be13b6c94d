"""The types in which terms compute: sums in fp32 or wider, layers as their inputs come."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_like", "widened"]


def autocast_like(features: Tensor) -> AbstractContextManager[Any]:
    """Autocast to the type of `features`, for connectors and teacher stages inside a term.

    Terms run outside of autocast, so that their sums are exact, and get what the networks gave:
    bf16 under autocast, which layers with fp32 weights refuse.
    """
    if features.dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(features.device.type, dtype=features.dtype)
    return nullcontext()


def widened(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is in fp64: the types in which terms sum."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
