"""A file of answers: blocks of consecutive places in the order of one epoch, appended one by one.

    head:   magic, version, length and checksum of a JSON text (the cache's identity, what the
            columns are)
    block:  magic, first place, number of places, checksum of these and of the data; then the data,
            column by column

Every part begins at a multiple of 64 bytes. A file is only ever appended to, by the process that
made it, so whatever was written whole stays readable whatever happens to that process; the rest is
recognised and left out. Nothing in a file is trusted before its checksum is right. Blocks are read
and not mapped into memory: a file that another program cuts short would end the process.
"""

import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.config.values import is_mapping

__all__ = ["Block", "Segment", "SegmentWriter", "file_bytes"]

_HEAD = struct.Struct("<8sII")
_HEAD_MAGIC = b"fastkdA1"
_BLOCK = struct.Struct("<8sQII")
_BLOCK_MAGIC = b"answers1"
_ALIGN = 64
_WIDEST = 1 << 32
"""Bytes of an image in a column."""
_LONGEST_HEAD = 1 << 20


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


def file_bytes(identity: str, row_bytes: Mapping[str, int], blocks: Mapping[int, int]) -> int:
    """Bytes of a file. blocks: how many of them there are, by their number of places."""
    layout = _Layout(row_bytes)
    data = sum(count * (_ALIGN + layout.offsets(num)[1]) for num, count in blocks.items())
    return len(_file_head(identity, row_bytes)) + data


def _file_head(identity: str, row_bytes: Mapping[str, int]) -> bytes:
    text = json.dumps({"identity": identity, "columns": dict(row_bytes)}).encode()
    head = _HEAD.pack(_HEAD_MAGIC, len(text), zlib.crc32(text)) + text
    return head.ljust(_padded(len(head)), b"\0")


@dataclass
class Segment:
    """A file that is read."""

    path: Path
    blocks: tuple[Block, ...]
    file: FileIO
    layout: _Layout
    _last: tuple[Block, bytearray] | None = None
    """The block that was read last: a batch may begin where another has ended in it."""

    @classmethod
    def open(
        cls, path: Path, identity: str, row_bytes: Mapping[str, int], places: int
    ) -> "Segment | None":
        """The blocks that were written whole.

        row_bytes: bytes of a place in each column that is wanted. None for a file of another cache,
        or without these columns, or without a block. Raises OSError.
        """
        file = FileIO(path)
        head, start = _head_of(file)
        columns = head.get("columns")
        if head.get("identity") != identity or not is_mapping(columns):
            return None
        widths = {str(name): each for name, each in columns.items()}
        if not all(type(each) is int and 0 < each <= _WIDEST for each in widths.values()):
            return None
        if any(widths.get(name) != each for name, each in row_bytes.items()):
            return None
        layout = _Layout(widths)
        blocks = tuple(_blocks(file, start, layout, places))
        return cls(path, blocks, file, layout) if blocks else None

    def rows(self, block: Block, places: slice) -> dict[str, Tensor] | None:
        """Some places of a block, by column uint8 [N, bytes]; None if the block is damaged."""
        data = self._data(block)
        if data is None:
            return None
        offsets, _ = self.layout.offsets(block.num)
        num, behind = places.stop - places.start, places.start - block.first
        return {
            column: torch.frombuffer(
                data, dtype=torch.uint8, count=num * each, offset=offsets[column] + behind * each
            ).view(num, each)
            for column, each in self.layout.row_bytes.items()
        }

    def _data(self, block: Block) -> bytearray | None:
        """The data of a block, if their checksum is right."""
        if self._last is None or self._last[0] != block:
            _, end = self.layout.offsets(block.num)
            data = bytearray(_read(self.file, block.offset, end))
            whole = len(data) == end and _checksum(block.first, block.num, [data]) == block.checksum
            if not whole:
                return None
            self._last = block, data
        return self._last[1]


class SegmentWriter:
    """A new file that this process appends blocks to. Methods raise OSError."""

    def __init__(self, path: Path, identity: str, row_bytes: Mapping[str, int]) -> None:
        """path: no file may be there; its folder is made."""
        self._layout = _Layout(row_bytes)
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._handle = os.open(path, flags, 0o666)
        self._end = 0
        self._append([_file_head(identity, row_bytes)])

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


def _checksum(first: int, num: int, data: Sequence[bytes | bytearray | memoryview]) -> int:
    found = zlib.crc32(struct.pack("<QI", first, num))
    for part in data:
        found = zlib.crc32(part, found)
    return found


def _read(file: FileIO, offset: int, num_bytes: int) -> bytes:
    """So many bytes, or fewer where the file ends or the disk fails."""
    try:
        return os.pread(file.fileno(), num_bytes, offset)
    except OSError:
        return b""


def _head_of(file: FileIO) -> tuple[Mapping[str, Any], int]:
    """The JSON of a file's head, empty if it is not one of ours, and where the blocks begin."""
    fixed = _read(file, 0, _HEAD.size)
    if len(fixed) < _HEAD.size:
        return {}, 0
    magic, length, checksum = _HEAD.unpack(fixed)
    if magic != _HEAD_MAGIC or length > _LONGEST_HEAD:
        return {}, 0
    text = _read(file, _HEAD.size, length)
    if zlib.crc32(text) != checksum:
        return {}, 0
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}, 0
    return (found if is_mapping(found) else {}), _padded(_HEAD.size + length)


def _blocks(file: FileIO, start: int, layout: _Layout, places: int) -> "list[Block]":
    """The blocks one behind the other, up to the first that is not whole or not possible."""
    size_of_file, place, found = os.fstat(file.fileno()).st_size, start, list[Block]()
    while len(head := _read(file, place, _BLOCK.size)) == _BLOCK.size:
        magic, first, num, checksum = _BLOCK.unpack(head)
        if magic != _BLOCK_MAGIC or not 0 < num <= places or first + num > places:
            break
        _, size = layout.offsets(num)
        if place + _ALIGN + size > size_of_file:
            break
        found.append(Block(first, num, place + _ALIGN, checksum))
        place += _ALIGN + size
    return found
