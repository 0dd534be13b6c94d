"""Weight files: read from anyone's checkpoint, checked against a network, written as safetensors.

Used by the registry, the teacher and the checkpoint. Nothing that is read can run code: safetensors
holds no code, and `.pt`/`.pth` goes through torch's restricted unpickler, which here admits, beyond
tensors, argparse namespaces, paths, sets and numpy numbers, strings and arrays, and of which only
the tensors are kept.
"""

import argparse
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastkd.errors import RunFailed, UserError
from fastkd.storage.atomic import atomic_path

__all__ = ["LoadReport", "describe", "load_into", "load_weights", "save_weights"]

WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module"),
    *("student", "weights", "params"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
)
"""Keys under which training programs store the state dict; the first that is there wins, so plain
weights go before averaged ones."""

SHOWN = 4
"""Keys of each kind that an error message lists."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What `load_into` left out; all empty after a strict load."""

    missing: tuple[str, ...]
    """In the network, not in the file."""
    unexpected: tuple[str, ...]
    """In the file, not in the network."""
    wrong_shape: tuple[str, ...]
    """In both, with different shapes: `name: file 10x64, network 100x64`."""

    @property
    def complete(self) -> bool:
        """Every tensor of the file found its place and nothing was missing."""
        return not (self.missing or self.unexpected or self.wrong_shape)


def load_weights(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, on the CPU, and the metadata of a safetensors file (else empty).

    path: safetensors, a `torch.save` file (zip or legacy), or a run folder (its best.safetensors).
    Wrappers such as `state_dict` or `model` are opened; `module.` and `_orig_mod.` prefixes
    removed.
    Raises UserError when the file is missing, damaged, or holds objects other than data.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "best.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no such weight file")
    if _is_safetensors(path):
        state, metadata = _read_safetensors(path)
    else:
        state, metadata = _find_state(_read_pickle(path), path), {}
    return _bare(state), metadata


def load_into(
    model: nn.Module,
    source: str | PathLike[str] | Mapping[str, Tensor],
    *,
    strict: bool = True,
    metadata: Mapping[str, str] | None = None,
    origin: str = "the state dict",
    new: Sequence[str] = (),
) -> LoadReport:
    """Copy weights from a file or a state dict into a network, matching names and shapes.

    Wrapper prefixes on either side do not matter, nor does one common first component on all keys
    of the source (`model.` of Lightning). Networks of the zoo also know the names that other
    repositories use (`ZooNetwork.key_maps`). Values are cast to the network's dtype and device.
    `metadata` and `origin` (where they came from) improve the error message for a state dict.
    Raises UserError when strict and anything is missing, unexpected or wrongly shaped, and always
    when nothing fits; the network is then unchanged.
    """
    if isinstance(source, Mapping):
        state, facts = _bare(source), metadata or {}
    else:
        state, facts = load_weights(source)
        origin = str(source)
    tensors = {key: value for key, value in model.state_dict().items() if torch.is_tensor(value)}
    names = {bare: key for key, bare in _bare_names(tensors).items()}
    own = {bare: tensors[key] for bare, key in names.items()}
    if not state.keys() & own.keys():
        state = _without_first_component(state)
    state = _renamed(model, state, own)
    own = {key: value for key, value in own.items() if not _lies_in(key, new)}
    state = {key: value for key, value in state.items() if not _lies_in(key, new)}

    common = [key for key in own if key in state]
    fitting = [key for key in common if state[key].shape == own[key].shape]
    report = LoadReport(
        # Files older than torch 0.4.1 lack this counter; only cumulative averages need it.
        missing=tuple(
            key for key in own if key not in state and not key.endswith("num_batches_tracked")
        ),
        unexpected=tuple(key for key in state if key not in own),
        wrong_shape=tuple(
            f"{key}: file {_dims(state[key])}, network {_dims(own[key])}"
            for key in common
            if state[key].shape != own[key].shape
        ),
    )
    if (strict and not report.complete) or not fitting:
        hint = _hint(model, report, facts, state, own)
        title = f"{_title(model)}, of which {', '.join(new)} is new" if new else _title(model)
        listing = _listing(report) or "it has no tensor of this network"
        raise UserError(f"{origin} does not fit {title}: {listing}{hint}")
    model.load_state_dict({names[key]: state[key] for key in fitting}, strict=False)
    return report


def _lies_in(key: str, layers: Sequence[str]) -> bool:
    return key.startswith(tuple(f"{layer}." for layer in layers))


def describe(model: nn.Module) -> dict[str, str]:
    """Metadata from which `fastkd.models.model_from_file` builds the network again.

    Keys: `architecture`, `num_classes`, `options` (JSON), `normalization` (JSON [mean, std]), each
    only where the network has it; networks that `create_model` could not repeat give an empty dict.
    """
    if not hasattr(model, "fastkd_name"):
        return {}
    try:
        options = json.dumps(model.fastkd_options)
    except TypeError:  # an option such as a class; text cannot rebuild this network
        return {}
    facts = {
        "architecture": str(model.fastkd_name),
        "num_classes": str(model.num_classes),
        "options": options,
    }
    if model.normalization is not None:
        facts["normalization"] = json.dumps(model.normalization)
    return facts


def save_weights(
    path: str | PathLike[str],
    source: nn.Module | Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write safetensors atomically: the file is there whole, or the old one stays.

    Tensors are stored contiguous and without wrapper prefixes; tensors that share memory are each
    stored in full, so that the file loads strictly into the same network elsewhere. A module adds
    its own description (`describe`) to the metadata; given entries win.
    Raises RunFailed when the file cannot be written, such as on a full disk.
    """
    path = Path(path)
    facts = {"format": "pt"}
    if isinstance(source, nn.Module):
        facts |= describe(source)
        source = {
            key: value for key, value in source.state_dict().items() if torch.is_tensor(value)
        }
    facts |= metadata or {}
    stored: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, tensor in _bare(source).items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        stored[key] = tensor.clone() if memory in taken else tensor
        taken.add(memory)

    try:
        # Not by safetensors' save_file, which makes files that only their owner can read.
        with atomic_path(path) as beside:
            beside.write_bytes(save(stored, metadata=facts))
    except OSError as error:
        raise RunFailed(
            f"{path}: cannot write the weights ({error}); free space or choose another place"
        ) from error


def _is_safetensors(path: Path) -> bool:
    """By suffix, or by the opening brace of the header that follows its 8-byte length."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as error:  # a damaged header surfaces as one of several classes
        raise UserError(f"{path}: damaged, or not a safetensors file ({error})") from error


def _read_pickle(path: Path) -> Any:
    known = torch.serialization.get_safe_globals()
    # Entries the user has admitted stay; safe_globals would take them away on leaving.
    admitted = [entry for entry in _admitted() if entry not in known]
    try:
        with torch.serialization.safe_globals(admitted), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles fail in as many ways as there are opcodes
        match = re.search(r"GLOBAL (\S+)", str(error))
        if match:
            raise UserError(
                f"{path}: holds a Python object ({match[1]}) that is refused because loading it "
                "could run code; where it was written, save the tensors only: "
                "torch.save(model.state_dict(), FILE)"
            ) from error
        # FRAME, with which pickles of protocol 4 and 5 begin.
        if "Unsupported operand 149" in str(error):
            raise UserError(
                f"{path}: written with pickle protocol 4 or 5, which torch's safe loader cannot "
                "read; where it was written, save it again without pickle_protocol="
            ) from error
        # Before its reason torch advises to load the file unsafely.
        reason = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
        reason = next(iter(reason.splitlines()), type(error).__name__)
        raise UserError(f"{path}: damaged, or not a PyTorch checkpoint ({reason[:200]})") from error


def _admitted() -> list[Any]:
    """What training scripts store beside tensors, none of which can run code."""
    rebuild_scalar = np.float64(0).__reduce__()[0]
    rebuild_array = np.empty(0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDSU"}
    admitted: list[Any] = [argparse.Namespace, set, frozenset, np.ndarray, np.dtype, *dtypes]
    # Python 3.13 has moved the class.
    admitted += [(PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1 and 2
        admitted += [
            (rebuild_scalar, f"{module}.scalar"),
            (rebuild_array, f"{module}._reconstruct"),
        ]
    return admitted


def _find_state(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint: below a known wrapper key, itself, or the only one there."""
    found = _state_below(content)
    if found:
        return found
    keys = list(content) if isinstance(content, Mapping) else []
    inside = f"the keys {', '.join(map(str, keys[:8]))}" if keys else f"a {type(content).__name__}"
    raise UserError(
        f"{path}: no state dict found, the file holds {inside}; expected tensors by name, bare or "
        f"under one of {', '.join(WRAPPERS)}"
    )


def _state_below(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
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


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {bare: state[key] for key, bare in _bare_names(state).items()}


def _bare_names(keys: Iterable[str]) -> dict[str, str]:
    """Key -> key without the marks of wrappers.

    `_orig_mod.` (torch.compile) goes wherever it stands, `module.` (data parallel, averaged models)
    where all keys begin with it; the `n_averaged` counter of an averaged model goes with it.
    """
    names = {key: key.replace("_orig_mod.", "") for key in keys}
    while True:
        wrapped = {key: name for key, name in names.items() if name != "n_averaged"}
        if not wrapped or not all(name.startswith("module.") for name in wrapped.values()):
            return names
        names = {key: name.removeprefix("module.") for key, name in wrapped.items()}


def _without_first_component(state: dict[str, Tensor]) -> dict[str, Tensor]:
    heads = {key.partition(".")[0] for key in state}
    if len(heads) != 1 or not all("." in key for key in state):
        return state
    return {key.partition(".")[2]: value for key, value in state.items()}


def _renamed(
    model: nn.Module, state: dict[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state in the network's names, by the key map that fits most of them; as it is, on a tie.

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


def _title(model: nn.Module) -> str:
    if hasattr(model, "fastkd_name"):
        return f"{model.fastkd_name} with {model.num_classes} classes"
    return type(model).__name__


def _listing(report: LoadReport) -> str:
    kinds = (
        ("missing", report.missing),
        ("unexpected", report.unexpected),
        ("of wrong shape", report.wrong_shape),
    )
    parts = []
    for kind, keys in kinds:
        if keys:
            more = "; .." if len(keys) > SHOWN else ""
            parts.append(f"{len(keys)} {kind} ({'; '.join(keys[:SHOWN])}{more})")
    return ", ".join(parts)


def _hint(
    model: nn.Module,
    report: LoadReport,
    facts: Mapping[str, str],
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> str:
    if facts.get("architecture", _name(model)) != _name(model):
        return f". The file holds {facts['architecture']} with {facts.get('num_classes')} classes"
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    only_head = (
        not (report.missing or report.unexpected)
        and len({key.rpartition(".")[0] for key in wrong}) == 1
        and all(state[key].shape[1:] == own[key].shape[1:] for key in wrong)
    )
    if only_head:
        classes = len(state[wrong[0]])
        return (
            f". The class counts differ: build the network with num_classes={classes}. In a recipe "
            "student.new_head=true (new_head=True) takes all but the classifier, and a teacher "
            "needs teacher.class_map: which of its outputs the classes of the data are"
        )
    if report.missing and all(".downsample." in key for key in report.missing) and not wrong:
        return '. The file has no projections: build the network with shortcuts="pad" or False'
    if len(own.keys() & state.keys()) - len(wrong) < len(own) / 2:
        return ". The file looks like another network"
    return ""


def _name(model: nn.Module) -> str | None:
    return getattr(model, "fastkd_name", None)


def _dims(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
