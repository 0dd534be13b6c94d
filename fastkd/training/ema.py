"""Exponential moving average of a network's weights, as a separate network.

Flow: `update.Update` calls `update(ok)` after each optimizer step, with the verdict of the guard;
evaluation and checkpoint take `module`. ema <- decay * ema + (1 - decay) * current, for parameters
and floating buffers alike (batch norm statistics; timm's ModelEmaV3 does the same); integer
buffers are copied. There is no warm-up: the average starts at the weights it is given.
"""

# torch documents its multi-tensor functions without exporting them to type checkers.
# pyright: reportPrivateImportUsage=false

import copy

import torch
from torch import Tensor, nn

from fastkd.teachers.teacher import freeze
from fastkd.training.guard import keep_where_, live_buffers

__all__ = ["EMA"]


class EMA:
    """Average of `model`, on its device and in its dtypes.

    Build it before hooks are placed on the model: the copy would carry them along. `on_device`
    is as in `guard.Guard`.

    Raises:
        ValueError: decay is not within [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float, *, on_device: bool | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of an average must be in [0, 1), got {decay}")
        self.decay = decay
        self._module = freeze(copy.deepcopy(model))
        self._parameters = list(model.parameters())
        self._buffers = live_buffers(model)
        self._averages = [*self._module.parameters(), *live_buffers(self._module)()]
        on_cpu = all(average.device.type == "cpu" for average in self._averages)
        self._on_device = not on_cpu if on_device is None else on_device

    @property
    def module(self) -> nn.Module:
        """The averaged network, in eval mode and frozen; always the same object."""
        return self._module

    @torch.no_grad()
    def update(self, ok: Tensor) -> None:
        """Take one step towards the model's weights where `ok`, a 0-dim bool on the device."""
        if not self._on_device and not ok:
            return
        pairs = list(zip(self._averages, [*self._parameters, *self._buffers()], strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        others = [pair for pair in pairs if not pair[0].is_floating_point()]
        if floats:
            averages, sources = (list(tensors) for tensors in zip(*floats, strict=True))
            if self._on_device:
                moved = torch._foreach_lerp(averages, sources, 1 - self.decay)
                keep_where_(~ok, averages, moved)
            else:
                torch._foreach_lerp_(averages, sources, 1 - self.decay)
        if others:
            averages, sources = (list(tensors) for tensors in zip(*others, strict=True))
            keep_where_(~ok, averages, sources)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and buffers of the average, under the model's own names."""
        return self._module.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a checkpoint's average; all names must match."""
        self._module.load_state_dict(state)
