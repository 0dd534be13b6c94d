"""How other programs lay out a checkpoint: mappings in mappings, wrappers, names of repositories.

`fastkd.storage.finding` looks for a network in what is listed here.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastkd.config.values import is_list, is_mapping
from fastkd.errors import UserError
from fastkd.printable import few

__all__ = [
    "WRAPPING",
    "Groups",
    "KeyMap",
    "bare",
    "bare_names",
    "groups_below",
    "joined",
    "main_group",
    "renamings",
    "tensor_groups",
    "unwrapped_names",
]

Groups = dict[str, dict[str, Tensor]]
"""The tensors of a checkpoint: path of a mapping in it ("" is the outermost) -> name -> tensor."""

KeyMap = Mapping[str, str | None] | Callable[[Sequence[str]], Mapping[str, str]]
"""A repository's names of parameters -> ours: a table of beginnings, see `ZooNetwork.key_maps`, or
a function from all names to the new name of each."""

PLAIN = (
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
)
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
"""Keys under which training programs store an average of the weights (EMA)."""

WRAPPERS = (*AVERAGED, *PLAIN)
"""Keys under which they store the state dict; the first one present wins where no network is known
that says more: averaged weights first, as in timm."""

WRAPPING = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Components that data parallel modules, averages, torch.compile, FSDP and activation checkpoints
put into names, at any depth."""

MOST_PLACES, DEEPEST = 100_000, 20


def tensor_groups(content: Any, path: Path) -> Groups:
    """Every tensor of a checkpoint with the place where it lies. UserError if there is none."""
    groups: Groups = {}
    _collect(content, "", [], groups)
    if sum(map(len, groups.values())):
        return groups
    keys = list(content) if is_mapping(content) else []
    inside = f"the keys {few(map(str, keys))}" if keys else f"a {type(content).__name__}"
    raise UserError(
        f"{path}: no state dict found, the file holds {inside}; expected tensors by name, bare or "
        f"under a key such as {', '.join(PLAIN[:4])}"
    )


def _collect(content: Any, at: str, seen: list[str], groups: Groups) -> None:
    # A mapping may contain itself, or the same ones many times over.
    if (
        len(seen) >= MOST_PLACES
        or at.count(".") > DEEPEST
        or not (is_mapping(content) or is_list(content))
    ):
        return
    seen.append(at)
    own: dict[str, Tensor] = {}
    for key, value in content.items() if is_mapping(content) else enumerate(content):
        if not isinstance(value, Tensor):
            _collect(value, joined(at, str(key)), seen, groups)
        # Sparse, quantised and empty ones are the weights of no network here.
        elif value.layout == torch.strided and not (value.is_quantized or value.is_meta):
            own[str(key)] = value.detach()
    if own:
        groups[at] = own


def joined(*parts: str) -> str:
    """A dotted path of those parts that are not empty."""
    return ".".join(filter(None, parts))


def groups_below(groups: Groups, key: str) -> Groups:
    """What lies below a dotted path, which need not name wrappers such as `module`."""
    wanted = key.split(".")
    found: Groups = {}
    for at, tensors in groups.items():
        inside = _after(wanted, at)
        for name, tensor in tensors.items():
            if inside is not None:
                found.setdefault(inside, {})[name] = tensor
            elif (rest := _after(wanted, joined(at, name))) is not None:
                found.setdefault("", {})[rest] = tensor
    return found


def _after(wanted: Sequence[str], path: str) -> str | None:
    done = 0
    parts = path.split(".") if path else []
    for number, part in enumerate(parts):
        if done == len(wanted):
            return ".".join(parts[number:])
        if part == wanted[done]:
            done += 1
        elif part not in WRAPPING:
            return None
    return "" if done == len(wanted) else None


def main_group(groups: Groups, origin: str) -> dict[str, Tensor]:
    """The state dict for a reader who knows no network: below known wrapper keys, or the only one.

    Raises UserError if there are several.
    """
    found = _main(groups)
    if found:
        return found
    keys = dict.fromkeys(at.partition(".")[0] for at in groups)
    raise UserError(
        f"{origin}: no state dict found, the file holds the keys {few(keys)}; "
        f"expected tensors by name, bare or under one of {', '.join(WRAPPERS)}"
    )


def _main(groups: Groups) -> dict[str, Tensor]:
    by_key: dict[str, Groups] = {}
    for at, tensors in groups.items():
        key, _, rest = at.partition(".")
        if at:
            by_key.setdefault(key, {})[rest] = tensors
    for key in WRAPPERS:
        # mmengine writes the average to state_dict, and what it averages here.
        swapped = key == "ema_state_dict" and "steps" in by_key.get(key, {}).get("", {})
        if key in by_key and not swapped and (found := _main(by_key[key])):
            return found
    if "" in groups:
        return groups[""]
    below = [found for found in map(_main, by_key.values()) if found]
    return below[0] if len(below) == 1 else {}


def bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names without wrapper prefixes (`bare_names`)."""
    return {name: state[key] for key, name in bare_names(state).items()}


def bare_names(keys: Iterable[str]) -> dict[str, str]:
    """Name -> name without the prefixes of wrappers, as a network is saved.

    `_orig_mod.` (torch.compile) is removed everywhere, `module.` (data parallel, averaged models)
    if all keys begin with it, together with the `n_averaged` counter of an averaged model.
    """
    names = {key: key.replace("_orig_mod.", "") for key in keys}
    while True:
        wrapped = {key: name for key, name in names.items() if name != "n_averaged"}
        if not wrapped or not all(name.startswith("module.") for name in wrapped.values()):
            return names
        names = {key: name.removeprefix("module.") for key, name in wrapped.items()}


def unwrapped_names(keys: Iterable[str]) -> dict[str, str]:
    """Name -> name without the components of wrappers at any depth, to compare it with others.

    `module` stays where it is needed to tell the names apart.
    """
    keys = list(keys)
    names = {key: _without(key, WRAPPING) for key in keys}
    if len(set(names.values())) < len(names):
        names = {key: _without(key, WRAPPING - {"module"}) for key in keys}
    return names


def _without(key: str, components: frozenset[str]) -> str:
    *path, name = key.split(".")
    return ".".join([*(part for part in path if part not in components), name])


def renamings(model: nn.Module, names: Sequence[str]) -> list[Mapping[str, str]]:
    """The ways to read a file's names: as they are, and by each key map of the network."""
    maps: Mapping[str, KeyMap] = getattr(model, "key_maps", {})
    found: list[Mapping[str, str]] = [{name: name for name in names}]
    for key_map in maps.values():
        if isinstance(key_map, Mapping):
            table = cast(Mapping[str, str | None], key_map)
            renamed = {name: _rename(name, table) for name in names}
            found.append({name: new for name, new in renamed.items() if new is not None})
        else:
            found.append(key_map(names))
    return found


def _rename(key: str, key_map: Mapping[str, str | None]) -> str | None:
    for pattern, replacement in key_map.items():
        found = re.match(rf"{pattern}(?=\.)", key)
        if found:
            return None if replacement is None else found.expand(replacement) + key[found.end() :]
    return key
