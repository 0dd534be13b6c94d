"""A teacher whose answers are read from a cache, and asked for only where the cache lacks them.

Flow: `fastkd.training.build` puts one around the bound teacher, or in its place; the trainer asks
it for the images of a step. What was stored is what is trained on, in the run that writes a cache
as in those that read it.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.errors import UserError
from fastkd.losses.base.needs import MEAN_LOGITS, Need
from fastkd.teachers.cache.codec import CacheFormat, Column
from fastkd.teachers.cache.store import AnswerStore, size_in_words
from fastkd.teachers.ensemble import Ensemble
from fastkd.teachers.teacher import Teacher

__all__ = ["Answering", "CachedTeacher", "Keeping", "answers", "answers_to"]

_JUDGED = 8
"""Batches whose answers are compared with what was stored of them."""
_WAITING = 4
"""Steps that may wait for the copy from a GPU before they are written."""


def answers_to(images_NCHW: Tensor, teacher: Teacher | Ensemble) -> dict[str, Tensor]:
    """A teacher's answers to a few images, the first that it is shown, by need of every view."""
    features = teacher.tried(images_NCHW)
    return {
        str(Need.of(view, "teacher", tap)): features[tap]
        for view, taps in teacher.taps.items()
        for tap in taps
        if tap in features
    }


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """How a recipe wants answers to be kept."""

    format: CacheFormat = "full"
    top: int = 0
    """Classes of each image, where only the most probable ones are kept."""
    maps: tuple[str, ...] = ()
    """Taps of whole maps that are kept although they are large."""
    pool: int = 1
    """Images of x' for each of x."""
    images: int = 0
    """Of the whole run, for messages."""

    def columns(self, answers: Mapping[str, Tensor]) -> dict[str, Column]:
        """The columns of a cache for these answers to a few images, by need.

        UserError for a map that is not to be kept, and for a name that no loss asks for.
        """
        asked = {Need(name).tap for name in answers}
        if unasked := [tap for tap in self.maps if tap not in asked]:
            raise UserError(
                f"teacher.cache_maps={unasked[0]}: no loss asks the teacher for it; they ask for "
                f"{', '.join(sorted(asked))}"
            )
        return {name: self._column(Need(name), tensor) for name, tensor in answers.items()}

    def _column(self, need: Need, answer: Tensor) -> Column:
        in_pool = self.pool if need.view == "xprime" else 1
        if answer.dim() > 2 and need.tap not in self.maps:
            each = answer[0].numel() * answer.element_size() * in_pool
            raise UserError(
                f"teacher.cache would keep the map {need} of {list(answer.shape[1:])} for every "
                f"image, {size_in_words(each)} each and {size_in_words(each * self.images)} for "
                f"this run: if the disk has them, set teacher.cache_maps={need.tap}, else leave "
                f"out teacher.cache"
            )
        logits = need.tap == "logits" and answer.dim() == 2
        # The rest is spread evenly over classes; other numbers have none.
        kept: CacheFormat = self.format if logits or not self.format.startswith("top") else "full"
        return Column.of(answer, images=in_pool, format=kept, top=self.top)


class _Copy(NamedTuple):
    """Answers on their way from a GPU."""

    epoch: int
    part: slice
    rows: dict[str, Tensor]
    arrived: Any


class CachedTeacher:
    """In place of a `Teacher` or an `Ensemble`.

    store: what it reads and writes.
    part: this rank's places of a step, in the order of an epoch.
    device: where the answers are wanted.
    teacher: the bound teacher, if there is one; else `bind` makes it when it is first needed.
    """

    def __init__(
        self,
        store: AnswerStore,
        *,
        part: Callable[[int], slice],
        device: torch.device,
        teacher: Teacher | Ensemble | None,
        bind: Callable[[], Teacher | Ensemble],
    ) -> None:
        self.store = store
        self.part = part
        self.device = device
        self._teacher = teacher
        self._bind = bind
        self._waiting: deque[_Copy] = deque()
        self._divergence: list[Tensor] = []
        self._kept_logits = [
            need for need in store.needs if Need(need).tap in ("logits", MEAN_LOGITS)
        ]
        self.taps: dict[str, tuple[str, ...]] = {}
        for need in map(Need, store.needs):
            self.taps[need.view] = (*self.taps.get(need.view, ()), need.tap)

    @property
    def _is_lossless(self) -> bool:
        """Whether answers are kept as the teacher gives them."""
        columns = self.store.manifest.columns
        return all(columns[need].format == "full" for need in self.store.needs)

    @property
    def teacher(self) -> Teacher | Ensemble:
        """The network itself, built and bound when it is first needed."""
        if self._teacher is None:
            self._teacher = self._bind()
        return self._teacher

    def at(self, views: Mapping[str, Tensor], epoch: int, step: int) -> dict[str, Tensor]:
        """The answers to the views of a step, by need; both numbers from 0."""
        part = self.part(step)
        if self._waiting and self._waiting[0].epoch != epoch:
            self.flush()
        rows = self.store.rows(epoch, part)
        if rows is not None:
            return self._decoded({need: self._to_device(one) for need, one in rows.items()})
        answers = self.teacher(views)
        rows = {need: self._encoded(need, answers[need]) for need in self.store.needs}
        found = self._decoded(rows)
        self._judge(answers, found)
        self._write(epoch, part, rows)
        return found

    def lacks(self, epoch: int, step: int) -> bool:
        """Whether the network would be asked in a step; both numbers from 0."""
        return self.store.lacks(epoch, self.part(step))

    def features(self, images_NCHW: Tensor) -> dict[str, Tensor]:
        """Numbers with the shapes and types of the answers to some images, by tap."""
        made = torch.Generator().manual_seed(0)
        found: dict[str, Tensor] = {}
        for need in map(Need, self.store.needs):
            column = self.store.manifest.columns[need]
            noise = torch.randn(len(images_NCHW), *column.shape, generator=made)
            found[need.tap] = noise.to(self.device, column.type)
        return found

    def tried(self, images_NCHW: Tensor) -> dict[str, Tensor]:
        """`features`: that the network takes these images was seen when the cache was made."""
        return self.features(images_NCHW)

    def flush(self) -> None:
        """Write what still waits for a GPU."""
        while self._waiting:
            self._write_first()

    def close(self) -> None:
        """The same, and close what is written to."""
        self.flush()
        self.store.close()

    def report(self) -> dict[str, Any]:
        """For summary.json: where answers were kept, how, what that costs, how many were read."""
        store = self.store
        columns = store.manifest.columns
        kept = {need: columns[need] for need in store.needs}
        found: dict[str, Any] = {
            "folder": str(store.folder),
            "format": {need: column.format for need, column in kept.items()},
            "bytes_per_image": store.place_bytes,
            "images_read": store.read,
            "images_written": store.written,
        }
        if self._divergence:
            # KL(teacher || kept), mean over the images of the first batches.
            found["kl"] = float(torch.stack(self._divergence).mean())
        return found

    def _encoded(self, need: str, answer: Tensor) -> Tensor:
        """uint8 [places, bytes]; of a pool the images of a place lie together."""
        column, codec = self.store.manifest.columns[need], self.store.codecs[need]
        if (tuple(answer.shape[1:]), answer.dtype) != (column.shape, column.type):
            raise UserError(
                f"the teacher's {need} is {list(answer.shape[1:])} of {answer.dtype} for every "
                f"image, and {self.store.folder} keeps {list(column.shape)} of {column.dtype}: "
                f"name another folder as teacher.cache, or leave it out"
            )
        if column.images > 1:
            answer = answer.unflatten(0, (column.images, -1)).transpose(0, 1).flatten(0, 1)
        return codec.encode(answer)

    def _decoded(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for need, one in rows.items():
            column, codec = self.store.manifest.columns[need], self.store.codecs[need]
            answer = codec.decode(one.view(-1, codec.row_bytes))
            if column.images > 1:
                answer = answer.unflatten(0, (-1, column.images)).transpose(0, 1).flatten(0, 1)
            found[need] = answer
        return found

    def _to_device(self, rows: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return rows.pin_memory().to(self.device, non_blocking=True)
        return rows

    def _judge(self, answers: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
        if self._is_lossless or len(self._divergence) >= _JUDGED:
            return
        each = [_kl(answers[need], found[need]) for need in self._kept_logits]
        if each:
            self._divergence.append(torch.stack(each).mean())

    def _write(self, epoch: int, part: slice, rows: Mapping[str, Tensor]) -> None:
        if self.device.type != "cuda":
            self.store.write(epoch, part, rows)
            return
        copies = {
            need: torch.empty(one.shape, dtype=one.dtype, pin_memory=True).copy_(
                one, non_blocking=True
            )
            for need, one in rows.items()
        }
        arrived = torch.cuda.current_stream(self.device).record_event()
        self._waiting.append(_Copy(epoch, part, copies, arrived))
        while self._waiting and (len(self._waiting) > _WAITING or self._waiting[0].arrived.query()):
            self._write_first()

    def _write_first(self) -> None:
        copy = self._waiting.popleft()
        copy.arrived.synchronize()
        self.store.write(copy.epoch, copy.part, copy.rows)


Answering = Teacher | Ensemble | CachedTeacher
"""What answers for the taps that the losses need."""


def answers(
    teacher: Answering | None, views: Mapping[str, Tensor], epoch: int, step: int
) -> dict[str, Tensor]:
    """A teacher's answers to the views of a step, by need; none without one."""
    if teacher is None:
        return {}
    return teacher.at(views, epoch, step) if isinstance(teacher, CachedTeacher) else teacher(views)


def _kl(given_NC: Tensor, kept_NC: Tensor) -> Tensor:
    """Mean KL divergence, fp32 0-dim."""
    log_p_NC, log_q_NC = (one.float().log_softmax(1) for one in (given_NC, kept_NC))
    return F.kl_div(log_q_NC, log_p_NC, log_target=True, reduction="batchmean")
