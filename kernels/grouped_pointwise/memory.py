"""Memory of the stages on every device: channels-last activations, fp32 vectors."""

import torch
from torch import Tensor

__all__ = ["channels_last", "empty", "fp32"]


def channels_last(x: Tensor) -> Tensor:
    """x itself, or a copy in channels-last memory."""
    return x.contiguous(memory_format=torch.channels_last)


def empty(like: Tensor, *sizes: int) -> Tensor:
    """[N, sizes] in channels-last memory."""
    return torch.empty(
        (len(like), *sizes),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def fp32(like: Tensor, *sizes: int) -> Tensor:
    """Memory on the same device, not filled."""
    return torch.empty(sizes, dtype=torch.float32, device=like.device)
