"""Reading weight files of any origin: opened once, then passed on as a `WeightFile`.

Reading never runs code: safetensors holds none, and `.pt`/`.pth` goes through torch's
restricted unpickler. Besides tensors it admits argparse namespaces, paths, sets and numpy numbers,
strings and arrays; only the tensors are kept.
"""

import argparse
import json
import re
import warnings
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path, PosixPath
from typing import Any, Self, cast

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from fastkd.errors import UserError
from fastkd.printable import few, first_line
from fastkd.storage.description import NetworkFacts
from fastkd.storage.file_kinds import refuse_other_kinds, weights_in
from fastkd.storage.foreign_checkpoints import (
    Groups,
    bare,
    groups_below,
    main_group,
    tensor_groups,
)

__all__ = ["WeightFile", "WeightSource", "load_weights"]


@dataclass(frozen=True, slots=True)
class WeightFile:
    """The contents of a weight file, read once. `str()` is the path as it was given."""

    given: str
    groups: Groups
    """All tensors, on the CPU, by the place where they lie."""
    facts: dict[str, str]
    """The metadata of a safetensors file, else empty."""

    @classmethod
    def open(cls, source: "WeightSource", key: str | None = None) -> "WeightFile":
        """Read a file; an opened one is returned unchanged.

        source: safetensors, a `torch.save` file (zip or legacy), the index of a file in several
            parts, or a folder with one of these (of a run: its best.safetensors).
        key: what to read of it: a dotted path below which the network lies, such as
            `state_dict_ema` or `model.teacher`.
        Raises UserError when the file is missing, damaged, or holds objects other than data.
        """
        if isinstance(source, WeightFile):
            return source if key is None else source.below(key)
        path = Path(source)
        if path.is_dir():
            path = weights_in(path)
        if not path.is_file():
            raise UserError(f"{path}: no such weight file")
        file = cls(str(source), *_read(path))
        return file if key is None else file.below(key)

    def below(self, key: str) -> Self:
        """Only what lies below a dotted path in the file; UserError if there is nothing."""
        groups = groups_below(self.groups, key)
        if not groups:
            known = dict.fromkeys(
                place.partition(".")[0]
                for at, tensors in self.groups.items()
                for place in ([at] if at else tensors)
            )
            raise UserError(
                f"{self}: weights_key={key!r} names nothing in this file, which holds {few(known)}"
            )
        return replace(self, groups=groups)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The state dict by name, without the prefixes of wrappers; averaged (EMA) weights first.

        UserError if it has several, and none of them stands out.
        """
        return bare(main_group(self.groups, str(self)))

    @property
    def network(self) -> NetworkFacts:
        """What the metadata say about the network. UserError if they cannot be read."""
        try:
            return NetworkFacts.from_metadata(self.facts)
        except ValueError as error:
            raise UserError(f"{self}: its metadata cannot be read ({error})") from error

    def __str__(self) -> str:
        return self.given


WeightSource = str | PathLike[str] | WeightFile
"""A path, or an already opened file."""


def load_weights(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and metadata of a file or a folder; see `WeightFile.open`."""
    file = WeightFile.open(path)
    return file.tensors, file.facts


def _read(path: Path) -> tuple[Groups, dict[str, str]]:
    if path.name.endswith(".index.json"):
        return _read_parts(path)
    if _is_safetensors(path):
        tensors, facts = _read_safetensors(path)
        if not tensors:
            raise UserError(f"{path}: no state dict found, the file holds no tensor")
        return {"": tensors}, facts
    refuse_other_kinds(path)
    return tensor_groups(_read_pickle(path), path), {}


def _read_parts(index: Path) -> tuple[Groups, dict[str, str]]:
    """All parts that an index of Hugging Face's libraries names, as one state dict."""
    try:
        parts: Any = json.loads(index.read_text())["weight_map"]
        names = sorted({str(part) for part in parts.values()})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: damaged, or not an index of weight files") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        part = index.parent / name
        if Path(name).name != name or name.endswith(".index.json"):
            raise UserError(f"{index}: names {name!r}, which is not a weight file beside it")
        if not part.is_file():
            raise UserError(f"{part}: no such weight file; {index.name} names it as a part")
        groups, _ = _read(part)
        tensors |= groups.get("", {})
    return {"": tensors}, {}


def _is_safetensors(path: Path) -> bool:
    """By suffix, or by the opening brace of the header that follows its 8-byte length."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" or (path.suffix == ".safetensors" and not _is_text(start))


def _is_text(start: bytes) -> bool:
    return not start or (start.isascii() and all(byte >= 9 for byte in start))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        opened: Any = safe_open(path, framework="pt", device="cpu")
        with opened as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as error:  # a damaged header surfaces as one of several classes
        raise UserError(f"{path}: damaged, or not a safetensors file ({error})") from error


def _read_pickle(path: Path) -> Any:
    # torch does not say what the entries' constructors return.
    known = cast(list[Any], torch.serialization.get_safe_globals())  # pyright: ignore[reportUnknownMemberType]
    # Keep entries that the user has admitted; safe_globals would remove them on exit.
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
                "read; where it was written, save it again by torch.save(model.state_dict(), "
                "FILE), without pickle_protocol="
            ) from error
        # Before its reason torch advises loading the file unsafely.
        reason = str(error).partition("WeightsUnpickler error:")[2].strip()
        raise UserError(
            f"{path}: damaged, or not a PyTorch checkpoint ({first_line(reason or error, 200)})"
        ) from error


def _admitted() -> list[Any]:
    """What training scripts store besides tensors; none of it can run code."""
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
