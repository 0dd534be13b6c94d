"""Compares what a last.pt holds with this run, before any of it is taken.

A run folder may come from a stranger or from another version. Fused optimizers walk raw memory, so
a tensor of another shape or type would be read beyond its end; a part that fails halfway would
leave a run of two halves.
"""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastkd.config.values import is_list, is_mapping
from fastkd.errors import UserError
from fastkd.printable import brief, few

__all__ = ["check_optimizer", "check_part", "check_rows"]


def check_part(path: Path, name: str, own: Any, saved: Any) -> None:
    """UserError unless every tensor and value of a part has the same place, shape and type.

    own: the state of the part now, which is about to be replaced.
    """
    if isinstance(own, Tensor) or isinstance(saved, Tensor):
        _check_tensor(path, name, own, saved)
    elif is_mapping(own):
        _check_names(path, name, own, saved)
        for key, value in own.items():
            if not str(key).endswith("_extra_state"):  # of a module of the user's, of any form
                check_part(path, f"{name}.{key}", value, saved[key])
    elif is_list(own):
        if not is_list(saved) or len(saved) != len(own):
            _refuse(path, name, _called(saved), _called(own))
        for number, value in enumerate(own):
            check_part(path, f"{name}.{number}", value, saved[number])
    elif not _alike(own, saved):
        _refuse(path, name, _called(saved), _called(own))


def check_rows(path: Path, name: str, saved: Any) -> None:
    """UserError unless these are rows of metrics: plain values by name."""
    rows = saved if is_list(saved) else [None]
    plain = (int, float, str, type(None))
    for row in rows:
        if not is_mapping(row) or not all(
            isinstance(key, str) and isinstance(value, plain) for key, value in row.items()
        ):
            _refuse(path, name, _called(row), "rows of metrics")


def check_optimizer(path: Path, name: str, optimizer: Optimizer, saved: Any) -> None:
    """UserError unless its groups are this run's, and each state has the shape of its parameter."""
    own = optimizer.state_dict()
    _check_names(path, name, own, saved)
    groups = saved["param_groups"]
    if is_list(groups) and all(map(is_mapping, groups)):
        # Flags come and go with torch's versions, which fill them in themselves.
        pairs = list(zip(own["param_groups"], groups, strict=False))
        groups = [_with_flags_of(one, group) for one, group in pairs] + [*groups[len(pairs) :]]
    layout, counters = _layout(optimizer)
    expected = [
        {key: value for key, value in counters.items() if key in group} | one
        for one, group in zip(own["param_groups"], groups, strict=False)
    ]
    check_part(path, f"{name}.param_groups", expected + own["param_groups"][len(groups) :], groups)
    listed = [number for group in own["param_groups"] for number in group["params"]]
    known = [p for group in optimizer.param_groups for p in group["params"]]
    parameters = dict(zip(listed, known, strict=True))
    states = saved["state"] if is_mapping(saved["state"]) else {None: None}
    for number, state in states.items():
        at = f"{name}.state.{number}"
        if number not in parameters or not is_mapping(state):
            _refuse(path, at, _called(state), "the state of a parameter of this run")
        if not state:
            continue
        _check_names(path, at, layout, state)
        for key, value in state.items():
            model, like = layout[key], parameters[number]
            if value is None and (model is None or model.dim()):  # no gradient so far
                continue
            if model is not None and model.dim():
                model = torch.empty_like(like, device="meta")
            check_part(path, f"{at}.{key}", model, value)


def _with_flags_of(own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    flags = {key: value for key, value in own.items() if value is None or isinstance(value, bool)}
    kept = {
        key: value
        for key, value in saved.items()
        if key in own or not (value is None or isinstance(value, bool))
    }
    return flags | kept


def _layout(optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state that one step creates for a 2-D parameter, and the keys it adds to a group.

    Found by making a step with another optimizer of this kind.
    """
    like = next(p for group in optimizer.param_groups for p in group["params"])
    tried = torch.zeros(2, 3, dtype=like.dtype, device=like.device, requires_grad=True)
    tried.grad = torch.zeros_like(tried)
    taken = inspect.signature(type(optimizer)).parameters
    options = {key: value for key, value in optimizer.defaults.items() if key in taken}
    group = optimizer.param_groups[0]
    options |= {key: group[key] for key in options if key in group}
    scratch = type(optimizer)([tried], **options)
    scratch.step()
    return dict(scratch.state[tried]), dict(scratch.state_dict()["param_groups"][0])


def _check_tensor(path: Path, name: str, own: Any, saved: Any) -> None:
    dense = isinstance(saved, Tensor) and saved.layout == torch.strided and not saved.is_quantized
    if (
        not dense
        or not isinstance(own, Tensor)
        or (own.shape, own.dtype)
        != (
            saved.shape,
            saved.dtype,
        )
    ):
        _refuse(path, name, _called(saved), _called(own))


def _check_names(path: Path, name: str, own: Mapping[Any, Any], saved: Any) -> None:
    if not is_mapping(saved):
        _refuse(path, name, _called(saved), f"values by name ({few(map(str, own))})")
    differing = [*(key for key in own if key not in saved), *(k for k in saved if k not in own)]
    if differing:
        where = "is missing" if differing[0] in own else "is not part of this run"
        raise UserError(f"{path} does not fit this run: {name}.{brief(differing[0])} {where}")


def _alike(own: Any, saved: Any) -> bool:
    """Whether one plain value may stand for another: the same kind, and finite."""
    if isinstance(own, bool) or own is None or isinstance(own, str):
        return type(own) is type(saved)
    if isinstance(own, int | float):
        number = isinstance(saved, int | float) and not isinstance(saved, bool)
        return number and abs(saved) < 2**63 and math.isfinite(saved)
    return type(own) is type(saved)


def _refuse(path: Path, name: str, got: str, expected: str) -> None:
    raise UserError(f"{path} does not fit this run: {name} is {got}, expected {expected}")


def _called(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{'x'.join(map(str, value.shape)) or 'scalar'} of {str(value.dtype)[6:]}"
    return f"{type(value).__name__} {brief(value)}"
