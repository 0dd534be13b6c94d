"""Pictures of sample ids as a loader shows them: decoded, cut, and what becomes of bad files.

An image that cannot be read ends the run, or with data.on_bad=skip another one takes its place: the
next one in canonical order that can be read, which in a folder is mostly of the same class. Which
one follows from the files alone, so it is the same on every rank and in every epoch. In evaluation
nothing takes its place: its row is black and has no label, so no metric counts it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastkd.data.geometry import Crop
from fastkd.data.sources.cuts import Cut, framing_cut, random_cut
from fastkd.data.sources.image_set import ImageSource
from fastkd.errors import UserError
from fastkd.storage.facts import Framing, Interpolation

__all__ = ["Pixels", "Reader", "StandIns", "View"]

MOST_IN_A_ROW = 100
"""Bad files one after the other that are skipped: more of them are no accident."""

_Read = TypeVar("_Read")


@dataclass(frozen=True)
class View:
    """Which size x size pixels of a picture are shown."""

    size: int
    framing: Framing
    """In evaluation, and in training unless the crop is "resized"."""
    crop: Crop
    train: bool
    flip: bool
    """Mirror half of the random areas; other crops are mirrored on the device."""
    seed: int
    interpolation: Interpolation = "bilinear"
    """Of random areas."""

    @property
    def is_random(self) -> bool:
        """Whether a random area is cut out of the original picture."""
        return self.train and self.crop == "resized"

    def cut(self, picture: tuple[int, int], sample: int, epoch: int, appearance: int) -> Cut:
        """The square of a picture of this width and height."""
        if self.is_random:
            return random_cut(
                picture,
                self.size,
                self.seed,
                epoch,
                sample,
                self.flip,
                appearance,
                interpolation=self.interpolation,
            )
        return framing_cut(picture, self.framing)


class Pixels(NamedTuple):
    """A batch as it leaves the host."""

    pictures_BHWC: Tensor
    """uint8"""
    ids_B: Tensor
    """int64, of the images that are shown; of repeated ones as in `plan`."""
    more_BHWC: Tensor | None
    """Other crops of the pictures, by appearance, then by sample."""
    unread: dict[int, str]
    """Sample id -> why its image cannot be read."""


@dataclass
class StandIns:
    """Which image is shown for which id, as far as bad files are known."""

    num: int
    """Images of the split."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Sample id -> why its image cannot be read."""

    def of(self, ids_B: np.ndarray) -> np.ndarray:
        """The ids that are shown in place of these, int64."""
        if not self.reasons:
            return ids_B
        return np.array([self._of(sample) for sample in ids_B.tolist()], dtype=np.int64)

    def _of(self, id: int) -> int:
        sample = id % self.num
        found = (one for one in following(sample, self.num) if one not in self.reasons)
        return id - sample + next(found, sample)

    def said_of(self, ids_B: np.ndarray) -> tuple[tuple[int, str], ...]:
        """(id, reason) of those that cannot be read."""
        if not self.reasons:
            return ()
        samples = (id % self.num for id in ids_B.tolist())
        return tuple((n, self.reasons[n]) for n in samples if n in self.reasons)


def following(sample: int, num: int) -> Iterator[int]:
    """This id and the next ones of a split, as many as may stand in for it."""
    return ((sample + step) % num for step in range(min(num, MOST_IN_A_ROW)))


@dataclass(frozen=True)
class Reader:
    """Decodes pictures with Pillow; a process that decodes has its own copy."""

    source: ImageSource
    view: View
    skips: bool
    """data.on_bad=skip"""

    def read(
        self,
        ids: Sequence[int],
        epoch: int,
        appearances: Sequence[int] = (0,),
    ) -> Pixels:
        """A batch with the first appearance as its pictures, the others as more of them.

        Raises:
            UserError: an image cannot be read and none takes its place.
        """
        unread: dict[int, str] = {}
        found = [self.shown(id, epoch, appearances, unread) for id in ids]
        by_appearance = zip(*(pictures for _, pictures in found), strict=True)
        stacked = np.stack([picture for each in by_appearance for picture in each])
        every_BHWC, num = torch.from_numpy(stacked), len(found)
        ids_B = torch.tensor([id for id, _ in found])
        more_BHWC = every_BHWC[num:] if len(appearances) > 1 else None
        return Pixels(every_BHWC[:num], ids_B, more_BHWC, unread)

    def shown(
        self, id: int, epoch: int, appearances: Sequence[int], unread: dict[int, str]
    ) -> tuple[int, list[np.ndarray]]:
        """The id that is shown, and a picture for each appearance; bad files go to `unread`."""
        found = self.readable(id, self.source.image, unread)
        if found is None:
            return id, [self.black] * len(appearances)
        shown, image = found
        cuts = (self.view.cut(image.size, shown, epoch, k) for k in appearances)
        return shown, [np.asarray(cut.of(image)) for cut in cuts]

    def readable(
        self, id: int, read: Callable[[int], _Read], unread: dict[int, str]
    ) -> tuple[int, _Read] | None:
        """The id that is shown, and what `read` finds of its sample; None: a black row is shown.

        Raises:
            UserError: of `read`, if nothing takes its place.
        """
        num = len(self.source.labels_N)
        reason, tries = "", list(following(id % num, num))
        for candidate in tries:
            try:
                return id - id % num + candidate, read(candidate)
            except UserError as error:
                reason = str(error)
                if not self.skips:
                    raise UserError(reason, shared=False) from None
                unread[candidate] = reason
                if not self.view.train:
                    return None
        raise UserError(
            f"{self.source.name}: {len(tries)} images in a row cannot be read, the last one "
            f"because {reason}",
            shared=False,
        )

    @property
    def black(self) -> np.ndarray:
        """What is shown where nothing is, uint8 [H, W, 3]."""
        return np.zeros((self.view.size, self.view.size, 3), np.uint8)
