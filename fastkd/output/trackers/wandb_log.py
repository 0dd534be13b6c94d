"""Which epochs an offline run of W&B has on the disk, after its process was killed.

W&B's own process writes the transaction log from a buffer, which a kill loses together with rows
that were logged long before. Flow: `wandb` asks this when it resumes a run that nobody has closed.
Format: 7 bytes, then LevelDB's log, whose records are W&B's protocol buffers.
"""

import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["last_epoch"]

_FILE_HEADER, _BLOCK = 7, 32768
_HEADER = struct.Struct("<IHB")
"""Check sum, length and kind of a piece."""
_FULL, _LAST = 1, 4


def last_epoch(folder: Path, id: str) -> int | None:
    """The last epoch in all parts of a run; 0 for none, and None if there is no part."""
    files = [*folder.glob(f"offline-run-*-{id}/run-{id}.wandb")]
    epochs = (epoch for file in files for epoch in _epochs(file.read_bytes()))
    return max(epochs, default=0) if files else None


def _epochs(data: bytes) -> Iterator[int]:
    kinds: Any = import_module("wandb.proto.wandb_internal_pb2")
    torn: Any = import_module("google.protobuf.message").DecodeError
    for whole in _records(data):
        record = kinds.Record()
        try:
            record.ParseFromString(whole)
        except torn:  # by the kill
            return
        for item in record.history.item:
            if "epoch" in (item.key, *item.nested_key):
                yield int(float(item.value_json))


def _records(data: bytes) -> Iterator[bytes]:
    """Whole records, up to a piece that was cut short."""
    at, whole = _FILE_HEADER, b""
    while at + _HEADER.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER.size:
            at += left
            continue
        _, length, kind = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        if at + length > len(data):
            return
        whole += data[at : at + length]
        at += length
        if kind in (_FULL, _LAST):
            yield whole
            whole = b""
