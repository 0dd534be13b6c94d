"""Weights as safetensors, written atomically; also the public names for reading and fitting."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fastkd.storage.atomic import atomic_path
from fastkd.storage.description import describe
from fastkd.storage.fitting import LoadReport, load_into
from fastkd.storage.foreign_checkpoints import bare
from fastkd.storage.weight_file import WeightFile, load_weights

__all__ = [
    "LoadReport",
    "WeightFile",
    "describe",
    "load_into",
    "load_weights",
    "save_weights",
]


def save_weights(
    path: str | PathLike[str],
    source: nn.Module | Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write safetensors atomically: the new file is complete, or the old one stays.

    Tensors are stored contiguous and without wrapper prefixes; tensors that share memory are each
    stored in full, so that the file loads strictly into the same network elsewhere. A module adds
    its own description (`describe`) to the metadata; given entries win.
    Raises RunFailed where the file cannot be written, such as on a full disk.
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
    for key, tensor in bare(source).items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        stored[key] = tensor.clone() if memory in taken else tensor
        taken.add(memory)

    # Not by safetensors' save_file, which makes files that only their owner can read.
    with atomic_path(path) as beside:
        beside.write_bytes(save(stored, metadata=facts))
