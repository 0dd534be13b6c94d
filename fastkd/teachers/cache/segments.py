"""A file of answers: blocks of consecutive places in the order of one epoch, appended one by one.

    head:   magic, version, length and checksum of a JSON text (the cache's identity, what the
            columns are)
    block:  magic, first place, number of places, checksum of these and of the data; then the data,
            column by column

Every part begins at a multiple of 64 bytes. A file is only ever appended to, by the process that
made it, so whatever was written whole stays readable whatever happens to that process; the rest is
recognised and left out. Nothing in a file is trusted before its checksum is right.
"""

import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.config.values import is_list, is_mapping

__all__ = ["Block", "Segment", "SegmentWriter"]

_HEAD = struct.Struct("<8sII")
_HEAD_MAGIC = b"fastkdA1"
_BLOCK = struct.Struct("<8sQII")
_BLOCK_MAGIC = b"answers1"
_ALIGN = 64


def _padded(num_bytes: int) -> int:
    return num_bytes + -num_bytes % _ALIGN


class Block(NamedTuple):
    """Consecutive places whose answers lie in one piece."""

    first: int
    num: int
    offset: int
    """Of its data in the file."""
    checksum: int

    @property
    def places(self) -> slice:
        """Places in the order of the epoch."""
        return slice(self.first, self.first + self.num)


class _Layout:
    """Where the columns of a block lie: each one's offset behind the first, and their end."""

    def __init__(self, row_bytes: Mapping[str, int]) -> None:
        self.row_bytes = dict(row_bytes)

    def offsets(self, num: int) -> tuple[dict[str, int], int]:
        found, end = dict[str, int](), 0
        for name, each in self.row_bytes.items():
            found[name] = end
            end = _padded(end + num * each)
        return found, end


@dataclass(frozen=True)
class Segment:
    """A file that is read, mapped into memory."""

    path: Path
    blocks: tuple[Block, ...]
    memory: mmap.mmap
    layout: _Layout

    @classmethod
    def open(
        cls, path: Path, identity: str, row_bytes: Mapping[str, int], places: int
    ) -> "Segment | None":
        """The blocks that were written whole.

        row_bytes: bytes of a place in each column that is wanted. None for a file of another cache,
        or without these columns, or without a block. Raises OSError.
        """
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < _HEAD.size:
                return None
            # Private pages: torch wants memory that could be written.
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        head = _head_of(memory)
        columns = head.get("columns")
        if head.get("identity") != identity or not is_mapping(columns):
            return None
        if any(columns.get(name) != each for name, each in row_bytes.items()):
            return None
        layout = _Layout({str(name): int(each) for name, each in columns.items()})
        blocks = tuple(_blocks(memory, layout, places))
        if hasattr(memory, "madvise"):
            memory.madvise(mmap.MADV_SEQUENTIAL)
        return cls(path, blocks, memory, layout) if blocks else None

    def is_whole(self, block: Block) -> bool:
        """Whether the block's data are those that were written."""
        _, end = self.layout.offsets(block.num)
        data = memoryview(self.memory)[block.offset : block.offset + end]
        return len(data) == end and _checksum(block.first, block.num, [data]) == block.checksum

    def rows(self, block: Block, column: str, places: slice) -> Tensor:
        """Some places of a block in one column, uint8 [N, bytes], on the mapped memory."""
        offsets, _ = self.layout.offsets(block.num)
        each = self.layout.row_bytes[column]
        num = places.stop - places.start
        return torch.frombuffer(
            self.memory,
            dtype=torch.uint8,
            count=num * each,
            offset=block.offset + offsets[column] + (places.start - block.first) * each,
        ).view(num, each)


class SegmentWriter:
    """A new file that this process appends blocks to. Methods raise OSError."""

    def __init__(self, path: Path, identity: str, row_bytes: Mapping[str, int]) -> None:
        """path: no file may be there; its folder is made."""
        self._layout = _Layout(row_bytes)
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._handle = os.open(path, flags, 0o666)
        text = json.dumps({"identity": identity, "columns": self._layout.row_bytes}).encode()
        head = _HEAD.pack(_HEAD_MAGIC, len(text), zlib.crc32(text)) + text
        self._end = 0
        self._append([head.ljust(_padded(len(head)), b"\0")])

    def write(self, first: int, columns: Mapping[str, Tensor]) -> None:
        """Append a block: for each column uint8 [N, bytes] in the memory of the host."""
        num = len(next(iter(columns.values())))
        data: list[bytes | memoryview] = []
        for name, each in self._layout.row_bytes.items():
            size = num * each
            data.append(columns[name].contiguous().numpy().data.cast("B"))
            data.append(bytes(_padded(size) - size))
        head = _BLOCK.pack(_BLOCK_MAGIC, first, num, _checksum(first, num, data))
        self._append([head.ljust(_ALIGN, b"\0"), *data])

    def close(self) -> None:
        """No more blocks; may be called twice."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def _append(self, parts: Sequence[bytes | memoryview]) -> None:
        """All of it or, where the disk refuses, nothing."""
        whole = b"".join(parts)
        done = 0
        try:
            while done < len(whole):
                done += os.pwrite(self._handle, memoryview(whole)[done:], self._end + done)
        except OSError:
            os.ftruncate(self._handle, self._end)
            raise
        self._end += len(whole)


def _checksum(first: int, num: int, data: Sequence[bytes | memoryview]) -> int:
    found = zlib.crc32(struct.pack("<QI", first, num))
    for part in data:
        found = zlib.crc32(part, found)
    return found


def _head_of(memory: mmap.mmap) -> Mapping[str, Any]:
    """The JSON of a file's head; empty if it is not one of ours."""
    magic, length, checksum = _HEAD.unpack_from(memory)
    text = memory[_HEAD.size : _HEAD.size + length]
    if magic != _HEAD_MAGIC or zlib.crc32(text) != checksum:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if is_mapping(found) and not is_list(found) else {}


def _blocks(memory: mmap.mmap, layout: _Layout, places: int) -> "list[Block]":
    """The blocks one behind the other, up to the first that is not whole or not possible."""
    _, length, _ = _HEAD.unpack_from(memory)
    place, found = _padded(_HEAD.size + length), list[Block]()
    while place + _ALIGN <= len(memory):
        magic, first, num, checksum = _BLOCK.unpack_from(memory, place)
        if magic != _BLOCK_MAGIC or not 0 < num <= places or first + num > places:
            break
        _, size = layout.offsets(num)
        if place + _ALIGN + size > len(memory):
            break
        found.append(Block(first, num, place + _ALIGN, checksum))
        place += _ALIGN + size
    return found
