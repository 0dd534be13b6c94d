"""How other programs lay out a checkpoint: wrapper keys, prefixes, names of other repositories."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastkd.config.values import is_mapping
from fastkd.errors import UserError

__all__ = ["bare", "bare_names", "find_state", "renamed_for", "without_first_component"]

WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "student",
    "weights",
    "params",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
)
"""Keys under which training programs store the state dict; the first one present wins, so plain
weights take precedence over averaged ones."""


def find_state(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint: below a known wrapper key, itself, or the only one inside."""
    found = _state_below(content)
    if found:
        return found
    keys = list(content) if is_mapping(content) else []
    inside = f"the keys {', '.join(map(str, keys[:8]))}" if keys else f"a {type(content).__name__}"
    raise UserError(
        f"{path}: no state dict found, the file holds {inside}; expected tensors by name, bare or "
        f"under one of {', '.join(WRAPPERS)}"
    )


def _state_below(content: Any) -> dict[str, Tensor]:
    if not is_mapping(content):
        return {}
    for key in WRAPPERS:
        found = _state_below(content.get(key))
        if found:
            return found
    tensors = {
        key: value.detach()
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if tensors:
        return tensors
    below = [found for found in map(_state_below, content.values()) if found]
    return below[0] if len(below) == 1 else {}


def bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names without wrapper prefixes (`bare_names`)."""
    return {name: state[key] for key, name in bare_names(state).items()}


def bare_names(keys: Iterable[str]) -> dict[str, str]:
    """Name -> name without wrapper prefixes.

    `_orig_mod.` (torch.compile) is removed everywhere, `module.` (data parallel, averaged models)
    if all keys begin with it, together with the `n_averaged` counter of an averaged model.
    """
    names = {key: key.replace("_orig_mod.", "") for key in keys}
    while True:
        wrapped = {key: name for key, name in names.items() if name != "n_averaged"}
        if not wrapped or not all(name.startswith("module.") for name in wrapped.values()):
            return names
        names = {key: name.removeprefix("module.") for key, name in wrapped.items()}


def without_first_component(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the one first component that all names share, such as Lightning's `model.`."""
    heads = {key.partition(".")[0] for key in state}
    if len(heads) != 1 or not all("." in key for key in state):
        return state
    return {key.partition(".")[2]: value for key, value in state.items()}


def renamed_for(
    model: nn.Module, state: dict[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state in the network's names, by the key map that fits most of them; unchanged on a tie.

    A 1x1 convolution of the source may be a linear layer here.
    """
    maps: Mapping[str, Mapping[str, str | None]] = getattr(model, "key_maps", {})
    candidates = [state]
    for key_map in maps.values():
        renamed = {key: _rename(key, key_map) for key in state}
        candidates.append({new: state[key] for key, new in renamed.items() if new is not None})
    best = max(candidates, key=lambda candidate: len(candidate.keys() & own.keys()))
    return {
        key: value.flatten(1)
        if value.ndim == 4 and value.shape[2:] == (1, 1) and key in own and own[key].ndim == 2
        else value
        for key, value in best.items()
    }


def _rename(key: str, key_map: Mapping[str, str | None]) -> str | None:
    for pattern, replacement in key_map.items():
        found = re.match(rf"{pattern}(?=\.)", key)
        if found:
            return None if replacement is None else found.expand(replacement) + key[found.end() :]
    return key
