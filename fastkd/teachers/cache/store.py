"""A folder of answers: what they belong to, and files of them for each epoch.

    DIR/manifest.json            the identity of the cache, its columns, facts of the teacher
    DIR/classifier.safetensors   the teacher's last layer, where a loss takes it over
    DIR/epoch-00000/*.answers    by the processes that asked the teacher (`segments`)

Several runs may read and write one folder at the same time: files belong to one process each, and
a place that two have written is the same in both.
"""

import itertools
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fastkd.errors import UserError
from fastkd.storage.atomic import FULL, atomic_path
from fastkd.teachers.cache.codec import Codec, Column, codec_of
from fastkd.teachers.cache.identity import Identity
from fastkd.teachers.cache.segments import Block, Segment, SegmentWriter, file_bytes

__all__ = ["FORMAT", "AnswerStore", "Manifest", "TeacherFacts", "size_in_words"]

FORMAT = 1
MANIFEST = "manifest.json"


class TeacherFacts(BaseModel):
    """What a run says of its teacher without building it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    summary: dict[str, Any]
    """Its entry in summary.json."""
    said: tuple[str, ...] = ()
    """The sentences about it on the screen."""
    evaluations: tuple[dict[str, float], ...] = ()
    """What each of the teachers reaches on the validation images."""
    validation: str = ""
    """Fingerprint of these images."""
    macs: tuple[float | None, ...] = ()
    """Multiply-accumulates of an image for each of the teachers; None where nobody can tell."""
    pooled: tuple[str, ...] | None = None
    """Taps that its classifier pools, where a loss asks for them."""


class Manifest(BaseModel):
    """What a folder of answers holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    identity: Identity
    places: int = Field(ge=1, le=1 << 40)
    """Images of an epoch."""
    columns: dict[str, Column]
    """By need, such as x/teacher/logits."""
    teacher: TeacherFacts
    written_by: dict[str, str] = {}
    """Machine and versions, for people."""

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The manifest of a folder; None if there is none. UserError for a damaged one."""
        path = folder / MANIFEST
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            raise UserError(
                f"teacher.cache={folder} is a file, or lies below one: name a folder"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}): {_ANEW}") from error
        try:
            found = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "its text"
            raise UserError(
                f"{path} is no manifest of a cache of answers, or damaged ({place}: "
                f"{first['msg']}): {_ANEW}"
            ) from None
        if found.format != FORMAT:
            raise UserError(
                f"{path} has format {found.format}, this fastkd reads {FORMAT}: {_ANEW}"
            )
        return found

    def write(self, folder: Path) -> None:
        """Write it atomically. RunFailed where the disk refuses."""
        with atomic_path(folder / MANIFEST) as beside:
            beside.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


_ANEW = "remove the folder, and the cache is made anew, or name another as teacher.cache"


@dataclass
class AnswerStore:
    """The answers of a cache to some needs: reads what is there, appends what is not.

    say: shows a sentence to the user. A block that is damaged, or missing where others of its epoch
    are there, is said once; so is a disk that takes no more.
    """

    folder: Path
    manifest: Manifest
    needs: tuple[str, ...]
    """The columns that are read and written."""
    rank: int = 0
    ranks: int = 1
    """Processes that write, each to a file of its own."""
    batch: int | None = None
    """Places that a process writes at a time; None: all that it has."""
    writes: bool = True
    """Whether answers that are not there are kept; false once the disk takes no more."""
    say: Callable[[str], None] = lambda _: None
    read: int = 0
    """Places that were found so far."""
    written: int = 0
    """Places that were written so far."""
    _epoch: "_Epoch | None" = None
    _writer: SegmentWriter | None = None
    _said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        columns = self.manifest.columns
        self.codecs: dict[str, Codec] = {need: codec_of(columns[need]) for need in self.needs}
        self._row_bytes = {
            need: codec.row_bytes * columns[need].images for need, codec in self.codecs.items()
        }

    @property
    def epoch_bytes(self) -> int:
        """Bytes of the files with the answers of one epoch, with all that is around them."""
        share = -(-self.manifest.places // self.ranks)
        whole, rest = divmod(share, self.batch or share)
        blocks = {self.batch or share: whole} | ({rest: 1} if rest else {})
        identity = self.manifest.identity.digest()
        return self.ranks * file_bytes(identity, self._row_bytes, blocks)

    @property
    def place_bytes(self) -> int:
        """Bytes of the answers to one image."""
        return sum(self._row_bytes.values())

    def there_bytes(self) -> int:
        """Bytes of answers in the folder."""
        total = 0
        for path in self.folder.glob("epoch-*/*.answers"):
            with suppress(OSError):  # another process may remove it
                total += path.stat().st_size
        return total

    def lacking_bytes(self, epochs: int) -> int:
        """Bytes that the disk lacks for the answers of so many epochs; not above 0: none."""
        there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        wanted = self.epoch_bytes * epochs - self.there_bytes()
        return wanted - shutil.disk_usage(there).free

    def lacks(self, epoch: int, part: slice) -> bool:
        """Whether a place of an epoch is not there, or damaged."""
        return self._opened(epoch).rows(part, self._note_damage) is None

    def rows(self, epoch: int, part: slice) -> dict[str, Tensor] | None:
        """The answers to some places as uint8 [N, bytes] by need; None if one is missing."""
        opened = self._opened(epoch)
        pieces = opened.rows(part, self._note_damage)
        if pieces is None:
            if opened.segments:
                self._note(
                    "missing",
                    f"{self.folder}: not all answers of epoch {epoch + 1} are there, from image "
                    f"{part.start + 1} on the teacher is asked for what is missing",
                )
            return None
        found: dict[str, Tensor] = {}
        for need, codec in self.codecs.items():
            each = [piece[need] for piece in pieces]
            whole = each[0] if len(each) == 1 else torch.cat(each)
            found[need] = whole.view(-1, codec.row_bytes)
        self.read += part.stop - part.start
        return found

    def write(self, epoch: int, part: slice, rows: Mapping[str, Tensor]) -> None:
        """Keep the answers to some places: by need uint8 on the host, [N, bytes]."""
        if not self.writes:
            return
        num = part.stop - part.start
        columns = {need: tensor.view(num, -1) for need, tensor in rows.items()}
        try:
            self._writer_of(epoch).write(part.start, columns)
        except OSError as error:
            self.writes = False
            why = "the disk is full" if error.errno in FULL else (error.strerror or str(error))
            self._note("disk", f"{self.folder}: {why}; no more answers are kept")
            return
        self.written += num

    def close(self) -> None:
        """Close what is written to; who asks next sees it too."""
        if self._writer:
            self._writer.close()
        self._writer = self._epoch = None

    def _opened(self, epoch: int) -> "_Epoch":
        if self._epoch is None or self._epoch.number != epoch:
            self.close()
            self._epoch = _Epoch.open(
                self.folder,
                epoch,
                self.manifest.identity.digest(),
                self._row_bytes,
                self.manifest.places,
            )
        return self._epoch

    def _writer_of(self, epoch: int) -> SegmentWriter:
        self._opened(epoch)
        if self._writer is None:
            stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            # Processes of several hosts may have one number.
            name = f"{stamp}-rank-{self.rank}-{secrets.token_hex(4)}.answers"
            self._writer = SegmentWriter(
                _folder_of(self.folder, epoch) / name,
                self.manifest.identity.digest(),
                self._row_bytes,
            )
        return self._writer

    def _note_damage(self, segment: Segment, block: Block) -> None:
        self._note(
            "damage",
            f"{segment.path}: the answers to images {block.first + 1} to {block.first + block.num} "
            f"are damaged (checksum): the teacher is asked again",
        )

    def _note(self, kind: str, sentence: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self.say(sentence)


def size_in_words(num_bytes: float) -> str:
    """35.2 KiB"""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.3g} GiB" if num_bytes < 1000 else f"{num_bytes:,.0f} GiB"


def _folder_of(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch:05d}"


@dataclass
class _Epoch:
    """The files of an epoch as they were when it was opened."""

    number: int
    segments: list[Segment]
    blocks: list[tuple[Segment, Block]]
    covered: np.ndarray
    """For every place the number of the block that holds it, int32; -1: none does."""

    @classmethod
    def open(
        cls, folder: Path, number: int, identity: str, row_bytes: Mapping[str, int], places: int
    ) -> "_Epoch":
        segments = list[Segment]()
        for path in _files(_folder_of(folder, number)):
            try:
                segment = Segment.open(path, identity, row_bytes, places)
            except OSError:
                continue  # as if it was not there
            if segment:
                segments.append(segment)
        blocks = [(segment, block) for segment in segments for block in segment.blocks]
        opened = cls(number, segments, blocks, np.full(places, -1, np.int32))
        opened._cover(range(len(blocks)))
        return opened

    def _cover(self, numbers: "range | list[int]") -> None:
        for number in numbers:
            self.covered[self.blocks[number][1].places] = number

    def rows(
        self, part: slice, damaged: Callable[[Segment, Block], None]
    ) -> list[dict[str, Tensor]] | None:
        """The places of a part in order, block by block; None if one is missing.

        damaged: is told of a block that is then left out.
        """
        while True:
            numbers = self.covered[part]
            if not len(numbers) or numbers.min() < 0:
                return None
            found, wrong = list[dict[str, Tensor]](), None
            for number, places in self._runs(numbers, part.start):
                segment, block = self.blocks[number]
                rows = segment.rows(block, places)
                if rows is None:
                    wrong = number
                    break
                found.append(rows)
            if wrong is None:
                return found
            damaged(*self.blocks[wrong])
            self._drop(wrong)

    def _drop(self, wrong: int) -> None:
        """Leave a block out; an earlier one may hold some of its places."""
        places = self.blocks[wrong][1].places
        self.blocks[wrong] = self.blocks[wrong][0], Block(0, 0, 0, 0)
        self.covered[places] = -1
        overlap = [
            number
            for number, (_, block) in enumerate(self.blocks)
            if block.num and block.places.start < places.stop and places.start < block.places.stop
        ]
        for number in overlap:
            first = max(self.blocks[number][1].places.start, places.start)
            last = min(self.blocks[number][1].places.stop, places.stop)
            self.covered[first:last] = number

    def _runs(self, numbers: np.ndarray, start: int) -> Iterator[tuple[int, slice]]:
        """The number of each block and its places, in order."""
        borders = np.flatnonzero(np.diff(numbers)) + 1
        for first, last in itertools.pairwise([0, *borders.tolist(), len(numbers)]):
            yield int(numbers[first]), slice(start + first, start + last)


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob("*.answers"))
    except OSError:
        return []
