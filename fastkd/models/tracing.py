"""What every symbolic trace of a network needs: no hooks, no effects, and which layers are norms.

Used by `models.rewrite.fuse` and `models.fused`.
"""

import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["PLAIN_NORMS", "has_activation", "has_own_forward", "without_effects", "without_hooks"]

PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_WITH_ACTIVATION = ("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct")


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Users' hooks must not be called with the proxies of a trace."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    hooked = [(one, name, getattr(one, name)) for one in model.modules() for name in names]
    try:
        for module, name, _ in hooked:
            setattr(module, name, OrderedDict())
        yield
    finally:
        for module, name, hooks in hooked:
            setattr(module, name, hooks)


def has_activation(norm: nn.Module) -> bool:
    """Whether it is one of timm's batch norms, which hold their activation (`act`)."""
    return f"{type(norm).__module__}.{type(norm).__qualname__}" in _WITH_ACTIVATION


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody has replaced its `forward`, which is then not that of its class."""
    return "forward" in vars(module) and not hasattr(module.forward, "is_fused_method")


@contextmanager
def without_effects(modules: Sequence[nn.Module], found: list[str]) -> Iterator[None]:
    """Undo what tracing does beside giving a graph, and enter it in `found`.

    A trace replays none of it: attributes that the code sets, buffers that it writes, random
    numbers that it draws.
    """
    before = [_Remembered(one) for one in dict.fromkeys(modules)]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        if any([one.restore() for one in before]):
            found.append("makes tensors or attributes of its own")
        drawn = not torch.equal(torch.get_rng_state(), states[0])
        if drawn or random.getstate() != states[1] or str(np.random.get_state()) != str(states[2]):
            found.append("draws random numbers")
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


class _Remembered:
    """The attributes of a module with what is in them, one level deep."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.values = dict(vars(module))
        kept = [one for one in self.values.values() if isinstance(one, (dict, list, set))]
        self.contents = [(one, copy(one)) for one in kept]
        tensors = (*module.buffers(recurse=False), *self.values.values())
        written = [one for one in tensors if isinstance(one, torch.Tensor)]
        self.tensors = [(t, t._version, t.clone()) for t in written if not t.is_inference()]

    def restore(self) -> bool:
        """Whether anything was changed."""
        changed = _differ(vars(self.module), self.values)
        vars(self.module).clear()
        vars(self.module).update(self.values)
        for one, content in self.contents:
            if _differ(one, content):
                changed = True
                one.clear()
                one.extend(content) if isinstance(one, list) else one.update(content)
        for tensor, version, value in self.tensors:
            if tensor._version != version:
                changed = True
                with torch.no_grad():
                    tensor.copy_(value)
        return changed


def _differ(new: Any, old: Any) -> bool:
    """Of collections, whether they hold other objects; equal ones may be others."""
    if isinstance(old, dict):
        return _differ(list(new), list(old)) or _differ(list(new.values()), list(old.values()))
    return [*map(id, new)] != [*map(id, old)]
