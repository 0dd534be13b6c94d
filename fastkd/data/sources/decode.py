"""From image files to RGB pixels, and the crops that depend on the size of the original.

Pillow decodes and resizes (antialiased bilinear), so the pixels are those of torchvision's
transforms on Pillow images. Only the formats of `formats` are opened; how their pixels become RGB
is said in `pixels`.
"""

import math
import os
import re
import stat
from collections.abc import Callable
from io import BytesIO
from os import PathLike
from typing import IO, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL import __version__ as pillow_version

from fastkd.data.draws import sample_uniforms
from fastkd.data.sources.formats import foreign_format, formats_for, missing_format, suffix
from fastkd.data.sources.pixels import DEFAULTS, Decoding, to_rgb
from fastkd.errors import UserError
from fastkd.printable import shown
from fastkd.storage.facts import Framing

__all__ = [
    "UNIFORMS_PER_CROP",
    "framed",
    "open_rgb",
    "random_resized_crop",
    "read_image",
]

_ATTEMPTS = 10
# Two per attempt for area and aspect, two for the place, one for the flip.
UNIFORMS_PER_CROP = 2 * _ATTEMPTS + 3

# A picture that would have more pixels than this is cut before it is enlarged: one of 1 x 40,000
# pixels would become 224 x 8,960,000.
_LARGEST_RESIZED = 1 << 24

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_WORDS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")

_Found = TypeVar("_Found")


def open_rgb(path: str | PathLike[str], decoding: Decoding = DEFAULTS) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        UserError: the file is missing, damaged, too large or of a format that is not opened, or
            nothing says how its pixels become RGB; the message names it.
    """
    return read_image(path, decoding, lambda image: to_rgb(image, decoding))


def read_image(
    path: str | PathLike[str], decoding: Decoding, use: Callable[[Image.Image], _Found]
) -> _Found:
    """What `use` makes of the opened, not yet decoded image.

    Raises:
        UserError: as `open_rgb`, also for whatever goes wrong in `use`.
    """
    name = os.fsdecode(path)
    try:
        # Opening a pipe would wait for whoever writes to it.
        if not stat.S_ISREG(os.stat(name).st_mode):
            raise UserError(f"{shown(name)} is not a regular file, so no image can be read from it")
        with open(name, "rb") as stream:
            return _named(name, stream, decoding, use)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"the image {shown(name)} cannot be read: {reason}") from error


def _named(
    name: str, stream: IO[bytes], decoding: Decoding, use: Callable[[Image.Image], _Found]
) -> _Found:
    """What `use` makes of an open file; every error becomes a UserError with its name."""
    try:
        return _opened(stream, formats_for(suffix(name)), decoding, use)
    except UserError as error:
        raise UserError(f"cannot read the image {shown(name)}: {error}") from error
    except UnidentifiedImageError as error:
        raise UserError(_unidentified(name, stream)) from error
    except Exception as error:
        # Decoders raise OSError, SyntaxError, ValueError, struct.error, ... on damaged files.
        reason = shown(str(error) or type(error).__name__)
        raise UserError(
            f"cannot decode the image {shown(name)}: {reason}; repair or remove the file"
        ) from error


def _opened(
    stream: IO[bytes],
    formats: tuple[str, ...],
    decoding: Decoding,
    use: Callable[[Image.Image], _Found],
) -> _Found:
    # Pillow's own limit is one for the process, and its message names no key.
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, decoding.max_pixels)
    try:
        with Image.open(stream, formats=formats) as image:
            width, height = image.size
            if width * height > decoding.max_pixels:
                raise UserError(_too_large(f"{width * height}", decoding))
            return use(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        number = re.search(r"\d+", str(error))
        raise UserError(_too_large(number[0] if number else "", decoding)) from error
    except ValueError as error:
        if isinstance(error, UserError) or "MAX_TEXT" not in str(error):
            raise
        # The words in a PNG are too long for Pillow; the picture does not need them.
        bare = _without_words(stream)
    with Image.open(bare, formats=("PNG",)) as image:
        return use(image)


def _too_large(pixels: str, decoding: Decoding) -> str:
    return (
        f"it has {pixels} pixels, more than data.max_pixels={decoding.max_pixels}: set "
        f"data.max_pixels={pixels} if the file can be trusted, or make the picture smaller"
    )


def _unidentified(name: str, stream: IO[bytes]) -> str:
    stream.seek(0)
    start = stream.read(64)
    found = foreign_format(start)
    if found:
        return f"cannot read the image {shown(name)}: it is {found}; convert it to PNG or remove it"
    if start and (missing := missing_format(suffix(name))):
        return (
            f"cannot read the image {shown(name)}: Pillow {pillow_version} cannot read {missing}; "
            "install a newer one, or convert the image to PNG"
        )
    what = "the file is empty" if not start else "it is not an image in a supported format"
    return f"cannot decode the image {shown(name)}: {what}; repair or remove the file"


def _without_words(stream: IO[bytes]) -> BytesIO:
    """A PNG without its text and its colour profile: a signature, then length, type, data, CRC."""
    stream.seek(len(_PNG_SIGNATURE))
    kept = [_PNG_SIGNATURE]
    while len(head := stream.read(8)) == 8:
        body = stream.read(int.from_bytes(head[:4], "big") + 4)
        if head[4:] not in _PNG_WORDS:
            kept += [head, body]
    return BytesIO(b"".join(kept))


def framed(image: Image.Image, framing: Framing) -> Image.Image:
    """The square that a framing shows of a picture.

    Rounding as torchvision's Resize and CenterCrop: the long side is floored, the offset rounded.
    """
    width, height = image.size
    resize, size = framing.resize, framing.crop
    method = Image.Resampling[framing.interpolation.upper()]
    new_width = new_height = resize
    if framing.mode == "center" and width <= height:
        new_height = int(resize * height / width)
    elif framing.mode == "center":
        new_width = int(resize * width / height)
    left = round((new_width - size) / 2.0)
    top = round((new_height - size) / 2.0)
    if new_width * new_height > _LARGEST_RESIZED:
        # The same square; the filter still sees the pixels around it.
        across, down = width / new_width, height / new_height
        right, bottom = min((left + size) * across, width), min((top + size) * down, height)
        box = left * across, top * down, right, bottom
        return image.resize((size, size), method, box)
    if (new_width, new_height) != (width, height):
        image = image.resize((new_width, new_height), method)
    return image.crop((left, top, left + size, top + size))


def random_resized_crop(
    image: Image.Image,
    size: int,
    seed: int,
    epoch: int,
    sample: int,
    flip: bool,
    appearance: int = 0,
) -> Image.Image:
    """Random area (8 to 100 %), aspect (3/4 to 4/3, log-uniform) and place, to size x size; flip.

    Up to ten attempts, then the largest central crop within the aspect range: the procedure of
    torchvision's RandomResizedCrop (Szegedy et al. 2015, arXiv:1409.4842, section 6), but every
    draw is a function of (seed, epoch, sample) and of which appearance of the sample it is.
    """
    uniforms = sample_uniforms(seed, epoch, sample, UNIFORMS_PER_CROP, appearance)
    left, top, width, height = _crop_box(image.size, uniforms)
    # Crop before resizing: resize(box=...) would let the filter look at pixels outside the crop.
    crop = image.crop((left, top, left + width, top + height))
    crop = crop.resize((size, size), Image.Resampling.BILINEAR)
    if flip and uniforms[-1] < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return crop


def _crop_box(image_size: tuple[int, int], uniforms: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels."""
    full_width, full_height = image_size
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
