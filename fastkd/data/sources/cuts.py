"""Which square of a picture is shown: by a framing in evaluation, at random in training.

A cut is numbers only, so that whoever decodes shows the same square: Pillow here, with the pixels
of torchvision's transforms on Pillow images, and DALI in `fastkd.data.loaders.dali_loader`.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastkd.data.draws import sample_uniforms
from fastkd.storage.facts import Framing, Interpolation

__all__ = ["UNIFORMS_PER_CROP", "Cut", "framing_cut", "random_cut"]

_ATTEMPTS = 10
# Two per attempt for area and aspect, two for the place, one for the flip.
UNIFORMS_PER_CROP = 2 * _ATTEMPTS + 3

# A picture that would have more pixels than this is cut before it is enlarged: one of 1 x 40,000
# pixels would become 224 x 8,960,000.
_LARGEST_RESIZED = 1 << 24


@dataclass(frozen=True)
class Cut:
    """An area of a picture, resized, and a square of the outcome. All in pixels."""

    box: tuple[int, int, int, int]
    """left, top, width, height of the area in the picture."""
    resized: tuple[int, int]
    """Width and height that the area is resized to, antialiased."""
    corner: tuple[int, int]
    """left, top of the square in that."""
    size: int
    """Side of the square."""
    interpolation: Interpolation = "bilinear"
    flip: bool = False
    """Mirror the square left-right."""

    @classmethod
    def whole(cls, size: int) -> "Cut":
        """A picture of size x size pixels as it is."""
        return cls((0, 0, size, size), (size, size), (0, 0), size)

    @property
    def is_huge(self) -> bool:
        """Whether the resized area would not fit into memory with ease."""
        return math.prod(self.resized) > _LARGEST_RESIZED

    def of(self, picture: Image.Image) -> Image.Image:
        """The square of a picture, which has the size that the cut was made for."""
        method = Image.Resampling[self.interpolation.upper()]
        left, top, width, height = self.box
        # Crop before resizing: resize(box=...) would let the filter see pixels outside the area.
        if self.box != (0, 0, *picture.size):
            picture = picture.crop((left, top, left + width, top + height))
        if self.is_huge:
            picture = picture.resize((self.size, self.size), method, self._part_of_area())
        else:
            if self.resized != (width, height):
                picture = picture.resize(self.resized, method)
            if self.resized != (self.size, self.size) or self.corner != (0, 0):
                left, top = self.corner
                picture = picture.crop((left, top, left + self.size, top + self.size))
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else picture

    def _part_of_area(self) -> tuple[float, float, float, float]:
        """left, top, right, bottom of the square in the area before it is resized."""
        _, _, width, height = self.box
        across, down = width / self.resized[0], height / self.resized[1]
        left, top = self.corner
        right = min((left + self.size) * across, width)
        bottom = min((top + self.size) * down, height)
        return left * across, top * down, right, bottom


def framing_cut(picture: tuple[int, int], framing: Framing) -> Cut:
    """The square that a framing shows of a picture of this width and height.

    Rounding as torchvision's Resize and CenterCrop: the long side is floored, the offset rounded.
    """
    width, height = picture
    resize, size = framing.resize, framing.crop
    new_width = new_height = resize
    if framing.mode == "center" and width <= height:
        new_height = int(resize * height / width)
    elif framing.mode == "center":
        new_width = int(resize * width / height)
    corner = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
    whole = (0, 0, width, height)
    return Cut(whole, (new_width, new_height), corner, size, framing.interpolation)


def random_cut(
    picture: tuple[int, int],
    size: int,
    seed: int,
    epoch: int,
    sample: int,
    flip: bool,
    appearance: int = 0,
    *,
    interpolation: Interpolation = "bilinear",
) -> Cut:
    """Random area (8 to 100 %), aspect (3/4 to 4/3, log-uniform) and place, to size x size; flip.

    Up to ten attempts, then the largest central crop within the aspect range: the procedure of
    torchvision's RandomResizedCrop (Szegedy et al. 2015, arXiv:1409.4842, section 6), but every
    draw is a function of (seed, epoch, sample) and of which appearance of the sample it is.
    """
    uniforms = sample_uniforms(seed, epoch, sample, UNIFORMS_PER_CROP, appearance)
    mirrored = flip and bool(uniforms[-1] < 0.5)
    box = random_box(picture, uniforms)
    return Cut(box, (size, size), (0, 0), size, interpolation, mirrored)


def random_box(picture: tuple[int, int], uniforms: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels, of UNIFORMS_PER_CROP numbers in [0, 1)."""
    full_width, full_height = picture
    low, high = math.log(3 / 4), math.log(4 / 3)
    for attempt in range(_ATTEMPTS):
        area = full_width * full_height * (0.08 + 0.92 * uniforms[2 * attempt])
        aspect = math.exp(low + (high - low) * uniforms[2 * attempt + 1])
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= full_width and 0 < height <= full_height:
            top = int(uniforms[-3] * (full_height - height + 1))
            left = int(uniforms[-2] * (full_width - width + 1))
            return left, top, width, height
    width, height = full_width, full_height
    if full_width < 3 / 4 * full_height:
        height = round(full_width / (3 / 4))
    elif full_width > 4 / 3 * full_height:
        width = round(full_height * (4 / 3))
    return (full_width - width) // 2, (full_height - height) // 2, width, height
