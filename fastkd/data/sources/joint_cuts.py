"""What is shown of a picture and of its label map: one value, applied to both.

    whole picture -> resized -> a window, which may reach beyond it -> mirrored -> padded below and
    on the right

The picture is resized with Pillow's bilinear filter (antialiased, as by torchvision's transforms on
Pillow images), the label map by Pillow's nearest, which takes the label at the centre of each new
pixel: a class is never blended. What lies beyond the picture is black and has no class. Labels at
1/s of the size are those at the centre of each s x s pixels, as Pillow's nearest takes them.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from fastkd.data.draws import JOINT, as_integers, as_uniforms, sample_words
from fastkd.data.sources.label_ids import NO_CLASS

__all__ = ["JointCut", "JointView", "at_stride"]

Labels = TypeVar("Labels", np.ndarray, Tensor)

Size = tuple[int, int]
"""Width and height."""

_WORDS = 4
"""Scale, top, left, mirror."""


@dataclass(frozen=True)
class JointCut:
    """All in pixels."""

    resized: Size
    """Width and height that the whole picture is resized to."""
    corner: tuple[int, int]
    """left, top of the window in that; negative beyond its edge."""
    window: Size
    """Width and height of the window."""
    size: Size
    """Width and height of the outcome, at least the window's."""
    flip: bool = False
    """Mirror the window left-right."""

    def of_image(self, picture: Image.Image) -> np.ndarray:
        """uint8 [H, W, 3] of an RGB picture."""
        if picture.size != self.resized:
            picture = picture.resize(self.resized, Image.Resampling.BILINEAR)
        return self._window(np.asarray(picture), 0)

    def of_labels(self, labels_HW: np.ndarray) -> np.ndarray:
        """uint8 [H, W] of a label map that has the picture's size."""
        if labels_HW.shape != self.resized[::-1]:
            label_map = Image.fromarray(labels_HW)
            labels_HW = np.asarray(label_map.resize(self.resized, Image.Resampling.NEAREST))
        return self._window(labels_HW, NO_CLASS)

    def _window(self, pixels: np.ndarray, beyond: int) -> np.ndarray:
        """The window of [h, w, ..], mirrored and padded, in a new array."""
        (left, top), (width, height) = self.corner, self.window
        shape = (self.size[1], self.size[0], *pixels.shape[2:])
        if self.corner == (0, 0) and shape == pixels.shape and not self.flip:
            return np.ascontiguousarray(pixels)
        out = np.full(shape, beyond, np.uint8)
        first, last = max(top, 0), min(top + height, pixels.shape[0])
        start, stop = max(left, 0), min(left + width, pixels.shape[1])
        if first >= last or start >= stop:
            return out
        shown = out[:height, :width]
        if self.flip:
            shown = shown[:, ::-1]
        shown[first - top : last - top, start - left : stop - left] = pixels[first:last, start:stop]
        return out


@dataclass(frozen=True)
class JointView:
    """How pictures of a split are cut; numbers only, and nothing random but (seed, epoch, id)."""

    short_side: int | None
    """Pixels of the short side after resizing; None: as stored."""
    multiple: int
    """Both sides of the outcome are one of this."""
    train: bool
    """False: the whole picture."""
    seed: int = 0
    num_ids: int = 0
    """All ids are below it."""
    padding: int = 0
    """A window may reach so many pixels beyond the picture on each side."""
    flip: bool = False
    scale: tuple[float, float] | None = None
    """Lowest and highest random factor of the size."""
    window: Size | None = None
    """Of a random window; None: as large as the picture."""

    def shown(self, picture: Size) -> Size:
        """Width and height of a picture of this size before scale, window and padding.

        Rounding as torchvision's Resize: the long side is floored.
        """
        width, height = picture
        if self.short_side is None:
            return picture
        if width <= height:
            return self.short_side, int(self.short_side * height / width)
        return int(self.short_side * width / height), self.short_side

    def out_size(self, picture: Size) -> Size:
        """Width and height of the outcome of a picture of this size."""
        window = self.window if self.train and self.window else self.shown(picture)
        return self._padded(window)

    def cuts(self, pictures: list[Size], ids_B: np.ndarray, epoch: int) -> list[JointCut]:
        """The cut of each picture of some ids, given by its width and height."""
        if not self.train:
            return [self.whole(picture) for picture in pictures]
        words_BK = sample_words(self.seed, epoch, JOINT, self.num_ids, ids_B, _WORDS)
        return [
            self._random(self.shown(picture), words_K)
            for picture, words_K in zip(pictures, words_BK, strict=True)
        ]

    def whole(self, picture: Size) -> JointCut:
        """The cut that shows all of a picture of this size, as in evaluation."""
        shown = self.shown(picture)
        return JointCut(shown, (0, 0), shown, self._padded(shown))

    def _random(self, shown: Size, words_K: np.ndarray) -> JointCut:
        resized, window = shown, self.window or shown
        if self.scale is not None:
            low, high = self.scale
            factor = low + (high - low) * float(as_uniforms(words_K[:1])[0])
            width, height = shown
            resized = max(1, int(width * factor + 0.5)), max(1, int(height * factor + 0.5))
        top = self._place(resized[1], window[1], words_K[1:2])
        left = self._place(resized[0], window[0], words_K[2:3])
        flip = self.flip and bool(as_integers(words_K[3:4], 2)[0])
        return JointCut(resized, (left, top), window, self._padded(window), flip)

    def _place(self, side: int, window: int, word: np.ndarray) -> int:
        """Where a window begins: anywhere in the padded picture, or around it if it is larger."""
        low, high = self.reach(side, window)
        return low + int(as_integers(word, high - low + 1)[0])

    def reach(self, side: int, window: int) -> tuple[int, int]:
        """Lowest and highest place at which a window of one side may begin."""
        ends = -self.padding, side + self.padding - window
        return min(ends), max(ends)

    def _padded(self, size: Size) -> Size:
        width, height = (-(-side // self.multiple) * self.multiple for side in size)
        return width, height


def at_stride(labels: Labels, stride: int) -> Labels:
    """Labels [.., H, W] at 1/stride of both sides, which are multiples of it."""
    return labels if stride == 1 else labels[..., stride // 2 :: stride, stride // 2 :: stride]
