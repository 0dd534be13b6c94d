"""Reading weight files of any origin: opened once, then passed on as a `WeightFile`.

Reading never runs code: safetensors holds none, and `.pt`/`.pth` goes through torch's
restricted unpickler. Besides tensors it admits argparse namespaces, paths, sets and numpy numbers,
strings and arrays; only the tensors are kept.
"""

import argparse
import re
import warnings
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PosixPath
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from fastkd.errors import UserError
from fastkd.storage.description import NetworkFacts
from fastkd.storage.foreign_checkpoints import bare, find_state

__all__ = ["WeightFile", "WeightSource", "load_weights"]


@dataclass(frozen=True, slots=True)
class WeightFile:
    """The contents of a weight file, read once. `str()` is the path as it was given."""

    given: str
    tensors: dict[str, Tensor]
    """By name, on the CPU, without the prefixes of wrappers."""
    facts: dict[str, str]
    """The metadata of a safetensors file, else empty."""

    @classmethod
    def open(cls, source: "WeightSource") -> "WeightFile":
        """Read a file; an opened one is returned unchanged.

        source: safetensors, a `torch.save` file (zip or legacy), or a run folder (its
            best.safetensors). Wrappers such as `state_dict` or `model` are opened; `module.` and
            `_orig_mod.` prefixes removed.
        Raises UserError when the file is missing, damaged, or holds objects other than data.
        """
        if isinstance(source, WeightFile):
            return source
        path = Path(source)
        if path.is_dir():
            path = path / "best.safetensors"
        if not path.is_file():
            raise UserError(f"{path}: no such weight file")
        if _is_safetensors(path):
            state, facts = _read_safetensors(path)
        else:
            state, facts = find_state(_read_pickle(path), path), {}
        return cls(str(source), bare(state), facts)

    @property
    def network(self) -> NetworkFacts:
        """What the metadata say about the network. UserError if they cannot be read."""
        try:
            return NetworkFacts.from_metadata(self.facts)
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(f"{self}: its metadata cannot be read ({error})") from error

    def __str__(self) -> str:
        return self.given


WeightSource = str | PathLike[str] | WeightFile
"""A path, or an already opened file."""


def load_weights(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and metadata of a file or a run folder; see `WeightFile.open`."""
    file = WeightFile.open(path)
    return file.tensors, file.facts


def _is_safetensors(path: Path) -> bool:
    """By suffix, or by the opening brace of the header that follows its 8-byte length."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


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
                "read; where it was written, save it again without pickle_protocol="
            ) from error
        # Before its reason torch advises loading the file unsafely.
        reason = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
        reason = next(iter(reason.splitlines()), type(error).__name__)
        raise UserError(f"{path}: damaged, or not a PyTorch checkpoint ({reason[:200]})") from error


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
