"""Weights of losses that change over a run: functions of the epoch for `LossTerm.schedules`.

Epochs count from 0, as in `fastkd.training.schedules`. All keep their value for a whole epoch, as
in the training loops they come from. The trainer stretches them by the recipe's `epoch_factor`,
like everything else.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastkd.losses.base.term import LossTerm

__all__ = ["cosine_decay", "linear_warmup", "scheduled_values"]


def scheduled_values(
    terms: Iterable[LossTerm], epoch: float, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """Values of `LossTerm.schedules` at `epoch`, by term and name, as 0-dim fp32 on the device."""
    return {
        term.name: {
            # torch.full fills on the device; torch.tensor would copy from the host.
            name: torch.full((), value(epoch), device=device)
            for name, value in schedules.items()
        }
        for term in terms
        if (schedules := term.schedules())
    }


def linear_warmup(epochs: float) -> Callable[[float], float]:
    """1 / epochs in the first epoch, rising by as much each epoch to 1; always 1 for epochs=0.

    The warm-up of DKD and ReviewKD: min(epoch / epochs, 1) with epochs counted from 1.
    """
    return lambda epoch: min((_whole(epoch) + 1) / epochs, 1.0) if epochs else 1.0


def cosine_decay(epochs: float, end: float) -> Callable[[float], float]:
    """1 in the first epoch, `end` from epoch `epochs` (from 0) on, half a cosine in between.

    JointRD's and AlignKD's eta: 60 epochs, end 0.5; the function `Cosine` of
    leoozy/JointRD_Neurips2020 process/multikd_train.py. Always `end` for epochs=0.
    """

    def value(epoch: float) -> float:
        if _whole(epoch) >= epochs:
            return end
        return end + (1 - end) * (1 + math.cos(math.pi * _whole(epoch) / epochs)) / 2

    return value


def _whole(epoch: float) -> int:
    """Complete epochs; 0.15 / 0.05 is a hair below 3."""
    return math.floor(epoch + 1e-9)
