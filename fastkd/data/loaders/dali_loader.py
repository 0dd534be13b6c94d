"""Large folders: images decoded and resized by NVIDIA DALI, on the GPU or in threads of the CPU.

Threads read files and their headers and compute the cut of each; `dali_graph` makes the squares;
order, labels, padded crops, flips and normalisation are those of the torch backend. What DALI would
read otherwise than Pillow (palettes, transparency, CMYK, 16 bits, a JPEG that ends early, EXIF that
is to be applied) is decoded by Pillow, and DALI gets its pixels as a PPM file. So both backends
show the same ids, areas and flips, and the same colours except for the rounding of two decoders and
filters: docs/data.md says how much that is.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from typing_extensions import override

from fastkd.data.loaders.dali_graph import (
    FILTERS,
    build_graph,
    inputs_of,
    outcome_of,
    require_dali,
)
from fastkd.data.loaders.decoding import Pixels
from fastkd.data.loaders.processes import Key
from fastkd.data.loaders.streaming import StreamingLoader
from fastkd.data.sources.cuts import Cut
from fastkd.data.sources.decode import read_image
from fastkd.data.sources.folder import FolderIndex
from fastkd.data.sources.pixels import Decoding, to_rgb
from fastkd.errors import RunFailed, UserError
from fastkd.printable import first_line

__all__ = ["DaliLoader"]

_AHEAD = 2
"""Batches whose files are read ahead; one more is being decoded."""
_STREAM, _ALONE = "stream", "alone"
"""The pipeline of an epoch's batches, and the one in which files are tried one by one."""
_END_OF_JPEG = b"\xff\xd9"


class _File(NamedTuple):
    """A file for DALI: the id that is shown, and for each appearance bytes and a cut."""

    id: int
    parts: list[tuple[bytes, Cut]]


@dataclass
class _Fed:
    """A batch on its way through DALI."""

    epoch: int
    files: list[_File]
    unread: dict[int, str]


class DaliLoader(StreamingLoader):
    """A split decoded by DALI.

    workers: threads that decode on the CPU; 0: as many as there are cores.

    Raises:
        UserError: as TorchLoader; DALI is not installed, or the images are in no files.
    """

    @override
    def _start(self) -> None:
        require_dali()
        source = self._reader.source
        if not isinstance(source, FolderIndex):
            raise UserError(
                f"data.backend=dali decodes image files, {source.name} is in memory: use "
                "data.backend=resident"
            )
        self._files = source
        self._num_threads = self._workers or len(os.sched_getaffinity(0))
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="fastkd-dali")
        self._rows = -(-self.plan.batch_size // self.plan.world_size)
        self._pipelines: dict[str, Any] = {}
        self._refused: set[int] = set()

    @override
    def _stream(self, keys: Sequence[Key]) -> Iterator[Pixels]:
        left = iter(keys)
        reading: deque[_Reading] = deque()

        def fed_next() -> _Fed | None:
            while len(reading) < _AHEAD and (key := next(left, None)) is not None:
                reading.append(self._begin(*key))
            return self._feed(_STREAM, reading.popleft().result()) if reading else None

        fed = None
        try:
            fed = fed_next()
            while fed is not None:
                pixels = self._take(fed)
                # DALI decodes it while the caller is busy with this one.
                fed = fed_next()
                yield pixels
        finally:
            for one in reading:
                one.cancel()
            if fed is not None:
                # What was fed would come out at the beginning of the next epoch.
                self._pipelines.pop(_STREAM, None)

    def _begin(self, epoch: int, ids: np.ndarray) -> "_Reading":
        """Let the threads read the files of a batch."""
        unread: dict[int, str] = {}
        files = [self._threads.submit(self._file, id, epoch, unread) for id in ids.tolist()]
        return _Reading(epoch, files, unread)

    def _feed(self, name: str, batch: _Fed) -> _Fed:
        by_appearance = zip(*(file.parts for file in batch.files), strict=True)
        contents, cuts = zip(*(part for each in by_appearance for part in each), strict=True)
        pipeline = self._pipeline(name)
        for key, values in inputs_of(contents, cuts).items():
            pipeline.feed_input(key, values)
        pipeline.schedule_run()
        return batch

    def _take(self, batch: _Fed) -> Pixels:
        """The outcome of the batch that is in the pipeline of the epoch."""
        try:
            every_BHWC = outcome_of(self._pipeline(_STREAM), self._device)
        except RuntimeError as error:
            # A pipeline is of no use after an error.
            del self._pipelines[_STREAM]
            self._note_refused(batch, error)
            batch.files = [self._file(file.id, batch.epoch, batch.unread) for file in batch.files]
            self._feed(_STREAM, batch)
            every_BHWC = outcome_of(self._pipeline(_STREAM), self._device)
        num = len(batch.files)
        ids_B = torch.tensor([file.id for file in batch.files])
        more_BHWC = every_BHWC[num:] if len(every_BHWC) > num else None
        return Pixels(every_BHWC[:num], ids_B, more_BHWC, batch.unread)

    def _note_refused(self, batch: _Fed, error: RuntimeError) -> None:
        """Find the files that DALI refuses, one by one: Pillow decodes them from now on.

        So it does not depend on the other images of a batch who decodes an image.
        """
        refused: set[int] = set()
        for file in batch.files:
            alone = _Fed(batch.epoch, [file], {})
            try:
                self._feed(_ALONE, alone)
                outcome_of(self._pipeline(_ALONE), self._device)
            except RuntimeError:
                del self._pipelines[_ALONE]
                refused.add(file.id % len(self._files))
        if not refused:
            raise RunFailed(f"DALI failed: {first_line(error)}", shared=False) from error
        self._refused |= refused

    def _pipeline(self, name: str) -> Any:
        if name not in self._pipelines:
            view = self._reader.view
            own = view.interpolation if view.is_random else view.framing.interpolation
            self._pipelines[name] = build_graph(
                size=view.size,
                interpolation=own if own in FILTERS else "bilinear",
                rows=self._rows * len(self._appearances),
                threads=self._num_threads,
                device_id=(self._device.index or 0) if self._device.type == "cuda" else None,
            )
        return self._pipelines[name]

    def _file(self, id: int, epoch: int, unread: dict[int, str]) -> _File:
        """A file that DALI reads as Pillow does, with its cuts."""
        found = self._reader.readable(id, lambda n: for_dali(self._files, n), unread)
        if found is None:
            return _of_squares(id, [self._reader.black] * len(self._appearances))
        shown, (content, size) = found
        cuts = [self._reader.view.cut(size, shown, epoch, k) for k in self._appearances]
        of_pillow = any(cut.is_huge or cut.interpolation not in FILTERS for cut in cuts)
        if of_pillow or shown % len(self._files) in self._refused:
            # What the torch backend shows, for DALI to pass on.
            return _of_squares(*self._reader.shown(shown, epoch, self._appearances, unread))
        return _File(shown, [(content, cut) for cut in cuts])


def _of_squares(id: int, squares: Sequence[np.ndarray]) -> _File:
    return _File(id, [(as_ppm(square), Cut.whole(len(square))) for square in squares])


@dataclass
class _Reading:
    """A batch whose files are being read."""

    epoch: int
    files: list[Future[_File]]
    unread: dict[int, str]

    def result(self) -> _Fed:
        """Wait for them. UserError: one cannot be read, on this rank."""
        files = [one.result() for one in self.files]
        return _Fed(self.epoch, files, self.unread)

    def cancel(self) -> None:
        """Nobody wants them any more."""
        for one in self.files:
            one.cancel()


def for_dali(source: FolderIndex, sample: int) -> tuple[bytes, tuple[int, int]]:
    """A file that DALI decodes to Pillow's colours, and the picture's width and height.

    It is the file itself where that is so, else the picture that Pillow makes of it.

    Raises:
        UserError: Pillow cannot read it.
    """
    with source.open(sample) as stream:
        content = stream.read()

    def chosen(image: Image.Image) -> tuple[bytes, tuple[int, int]]:
        if _is_read_alike(image, content, source.decoding):
            return content, image.size
        picture = to_rgb(image, source.decoding)
        return as_ppm(np.asarray(picture)), picture.size

    return read_image(source.path(sample), BytesIO(content), source.decoding, chosen)


def _is_read_alike(image: Image.Image, content: bytes, decoding: Decoding) -> bool:
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return False
    # One that ends early is an error for Pillow; DALI fills it up with grey.
    if not content.endswith(_END_OF_JPEG):
        return False
    upright = 1
    return (
        decoding.exif == "ignore"
        or image.getexif().get(ExifTags.Base.Orientation, upright) == upright
    )


def as_ppm(picture_HWC: np.ndarray) -> bytes:
    """The file of a picture, uint8 RGB, without loss."""
    height, width, _ = picture_HWC.shape
    return b"P6 %d %d 255\n" % (width, height) + picture_HWC.tobytes()
