"""From image files to RGB pixels, and the crops that depend on the size of the original.

Pillow decodes and resizes (antialiased bilinear), so the pixels are those of torchvision's
transforms on Pillow images. EXIF orientation is not applied, as in torchvision's ImageFolder.
"""

import math
from os import PathLike, fspath
from pathlib import Path

import numpy as np
from PIL import Image

from fastkd.data.draws import sample_uniforms
from fastkd.errors import UserError
from fastkd.storage.facts import Framing

__all__ = ["UNIFORMS_PER_CROP", "framed", "open_rgb", "random_resized_crop"]

_ATTEMPTS = 10
# Two per attempt for area and aspect, two for the place, one for the flip.
UNIFORMS_PER_CROP = 2 * _ATTEMPTS + 3


def open_rgb(path: str | PathLike[str]) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        UserError: the file is missing, truncated or not an image; the message names it.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:
        # Decoders raise OSError, SyntaxError, ValueError, struct.error, ... on damaged files.
        reason = str(error).replace(repr(fspath(path)), "it") or type(error).__name__
        raise UserError(
            f"cannot decode the image {Path(path)}: {reason}; repair or remove the file"
        ) from error


def framed(image: Image.Image, framing: Framing) -> Image.Image:
    """The square that a framing shows of a picture.

    Rounding as torchvision's Resize and CenterCrop: the long side is floored, the offset rounded.
    """
    width, height = image.size
    resize, size = framing.resize, framing.crop
    new_width = new_height = resize
    if framing.mode == "center" and width <= height:
        new_height = int(resize * height / width)
    elif framing.mode == "center":
        new_width = int(resize * width / height)
    if (new_width, new_height) != (width, height):
        method = Image.Resampling[framing.interpolation.upper()]
        image = image.resize((new_width, new_height), method)
    left = round((new_width - size) / 2.0)
    top = round((new_height - size) / 2.0)
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
