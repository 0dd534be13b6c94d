"""What a chain asks: whether the op has a kernel, and which kind the planner picks."""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from fastkd.kernels import status
from fastkd.models.planner import CHOOSER, BlockSpec, Case, Kind

__all__ = ["NEVER_FROM", "has_kernel", "kind_for"]

NEVER_FROM = 64
"""From so many channels a group on `auto` does not ask: torch computes them as a dense product."""


def has_kernel(device_type: str) -> bool:
    """Whether the op has more than its reference for tensors on such a device."""
    return _runs(device_type)


@functools.cache
def _runs(device_type: str) -> bool:
    runs = status()["grouped_pointwise"]
    return device_type in ("cpu", "cuda") and not runs[device_type].startswith("reference")


def kind_for(
    facts: Sequence[Any],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    training: bool,
    batch_statistics: bool,
    channels_last: bool,
) -> Kind:
    """The kind for the chain `BlockSpec(*facts)`; the other arguments as in `Case`.

    While a network is compiled this runs in Python, and its answer becomes part of the graph.
    """
    num, channels, height, width = shape
    spec = BlockSpec(*facts)
    image = num, channels, height, width
    case = Case(spec, image, dtype, device, training, batch_statistics, channels_last)
    return CHOOSER.choose(case).kind


# What torch.compiler.assume_constant_result does, which would import the compiler, and Triton.
for _function in (kind_for, has_kernel):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]
