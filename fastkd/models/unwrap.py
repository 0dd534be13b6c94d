"""The network inside what others wrapped around it: torch.compile, DDP, averages of the weights.

`fastkd.distill` compiles and distributes for itself. Taps are then the paths of the network's own
modules, and a hook placed on a module that somebody else has compiled would not be called.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["uncompiled", "unwrapped"]

_INNER = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "ModelEma": "module",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
    "EMA": "ema_model",
}
"""Class of a wrapper (torch, timm, ema-pytorch) -> where it keeps the network."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, whatever was wrapped around it and in whatever order."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


@contextmanager
def uncompiled(*models: nn.Module) -> Iterator[None]:
    """No part of these networks is compiled inside the block; afterwards each is as before."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    calls = [
        (module, module._compiled_call_impl)
        for model in models
        for module in model.modules()
        if getattr(module, "_compiled_call_impl", None) is not None
    ]
    for model in models:
        for parent in [*model.modules()]:
            for name, child in parent._modules.items():
                if type(child).__name__ == "OptimizedModule":
                    assert child is not None
                    replaced.append((parent, name, child))
    for parent, name, child in replaced:
        parent._modules[name] = unwrapped(child)
    for module, _ in calls:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for parent, name, child in replaced:
            parent._modules[name] = child
        for module, call in calls:
            module._compiled_call_impl = call


def _inner(model: nn.Module) -> nn.Module | None:
    name = _INNER.get(type(model).__name__)
    inner = getattr(model, name, None) if name else None
    return inner if isinstance(inner, nn.Module) else None
