"""The form in which terms compute: sums in fp32 or wider, layers in the type of their inputs,
dense logits as rows.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_rows", "autocast_like", "widened"]


def autocast_like(features: Tensor) -> AbstractContextManager[Any]:
    """Autocast to the type of `features`, for connectors and teacher stages inside a term.

    Terms run outside autocast, so that their sums are exact. Their inputs come from the networks:
    bf16 under autocast, which layers with fp32 weights refuse.
    """
    if features.dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(features.device.type, dtype=features.dtype)
    return nullcontext()


def widened(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is in fp64: the types in which terms sum."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def as_rows(logits_NCX: Tensor) -> Tensor:
    """Logits [N, C] as they are, dense ones [N, C, H, W] as [N H W, C]: a row is a pixel."""
    if logits_NCX.dim() == 2:
        return logits_NCX
    return logits_NCX.movedim(1, -1).reshape(-1, logits_NCX.shape[1])
