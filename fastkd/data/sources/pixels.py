"""From whatever an image file holds to 8-bit RGB: depth, transparency, orientation.

    stored as                        becomes
    8-bit grey, colour, palette      its RGB values; grey three times
    1 bit                            0 and 255
    CMYK, YCbCr, LAB                 Pillow's RGB: for CMYK (255 - C)(255 - K) / 255, and so on
    16-bit colour                    the upper 8 bits of each channel
    16-bit grey                      the upper 8 bits: v >> 8; 12-bit TIFF: v >> 4
    the same with `white`            floor(v * 256 / (white + 1)), at most 255
    32-bit integers, signed 16 bits  refused without `white`, with it as above, at least 0
    floats                           refused without `white`, with it round(v * 255 / white)
    transparency                     `alpha`: dropped, or over white or black
    several frames or pages          the first

With the defaults, images of 8 bits are those of `Image.open(path).convert("RGB")`, which is what
torchvision's ImageFolder gives. Pillow alone clips deeper grey images to 0..255, which leaves them
nearly white, or floats in 0..1 black.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from fastkd.errors import UserError

__all__ = ["DEFAULTS", "MAX_PIXELS", "Alpha", "Decoding", "Exif", "is_deep", "to_rgb"]

Alpha = Literal["drop", "white", "black"]
Exif = Literal["ignore", "apply"]

MAX_PIXELS = 178_956_970
"""Where Pillow stops by default: twice the pixels of 256 MiB of RGB."""

_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF
_WHITE_IS_ZERO = 0
# Formats whose integers Pillow always gives as 0..65535, also where it calls the mode "I".
_SIXTEEN_BITS = ("PNG", "PPM")


@dataclass(frozen=True)
class Decoding:
    """How image files are read; the recipe keys of the same names are in `DataConfig`."""

    exif: Exif = "ignore"
    alpha: Alpha = "drop"
    white: float | None = None
    max_pixels: int = MAX_PIXELS

    @property
    def pixels(self) -> tuple[str, str, float | None]:
        """The part that decides which pixels come out."""
        return self.exif, self.alpha, self.white


DEFAULTS = Decoding()


def is_deep(image: Image.Image) -> bool:
    """Whether a grey image has more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def to_rgb(image: Image.Image, decoding: Decoding) -> Image.Image:
    """An image that was just opened, as RGB.

    Raises:
        UserError: pixels whose range is not known, or that no key describes; without the file's
            name, which the caller adds.
    """
    if decoding.white is not None and _is_deep_colour(image):
        raise UserError(
            f"it has 16 bits in each of its colours ({image.mode}), of which Pillow reads the "
            f"upper 8: data.white={decoding.white:g} cannot be used: it is for grey images"
        )
    image.load()
    if decoding.exif == "apply":
        image = ImageOps.exif_transpose(image)
    if is_deep(image):
        return _from_deep(image, decoding)
    return _without_alpha(image, decoding.alpha)


def _is_deep_colour(image: Image.Image) -> bool:
    tiles = getattr(image, "tile", ())
    return not is_deep(image) and any(";16" in str(tile) for tile in tiles)


def _without_alpha(image: Image.Image, alpha: Alpha) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    if alpha == "drop":
        # By way of RGBA where Pillow would warn of a palette with transparent colours.
        direct = image.mode in ("L", "RGB", "LA", "RGBA", "1")
        return (image if direct else image.convert("RGBA")).convert("RGB")
    ground = Image.new("RGBA", image.size, alpha)
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _from_deep(image: Image.Image, decoding: Decoding) -> Image.Image:
    values_HW = np.asarray(image)
    if values_HW.dtype.kind == "f":
        grey_HW = _from_floats(values_HW, image, decoding.white)
    else:
        grey_HW = _from_integers(values_HW, image, decoding.white)
    see_through = image.info.get("transparency")
    if decoding.alpha != "drop" and isinstance(see_through, int):
        grey_HW[values_HW == see_through] = 255 if decoding.alpha == "white" else 0
    return Image.fromarray(grey_HW).convert("RGB")


def _from_floats(values_HW: np.ndarray, image: Image.Image, white: float | None) -> np.ndarray:
    if white is None:
        raise UserError(_unknown_range(image, "floats", "1 if they run from 0 to 1"))
    if not np.isfinite(values_HW).all():
        raise UserError(f"its floats (mode {image.mode}) are not all finite")
    if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise UserError(f"its floats (mode {image.mode}) count from white to black")
    return np.clip(np.floor(values_HW * (255.0 / white) + 0.5), 0, 255).astype(np.uint8)


def _from_integers(values_HW: np.ndarray, image: Image.Image, white: float | None) -> np.ndarray:
    full = _full_scale(image)
    brightest = full if white is None else white
    if brightest is None:
        raise UserError(_unknown_range(image, "integers", "65535 if they use 16 bits"))
    if full is not None and _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        values_HW = full - values_HW.astype(np.int64)
    if brightest == 65535 and full is not None:
        return (values_HW >> 8).astype(np.uint8)  # the same, and faster
    return np.clip(np.floor(values_HW * (256.0 / (brightest + 1.0))), 0, 255).astype(np.uint8)


def _full_scale(image: Image.Image) -> int | None:
    """The largest value that the file's integers can have; None: it says nothing of use."""
    if image.mode != "I":
        bits = _tag(image, _BITS)
        return (1 << bits) - 1 if isinstance(bits, int) else 65535
    return 65535 if image.format in _SIXTEEN_BITS else None


def _tag(image: Image.Image, number: int) -> int | None:
    """The (first) value of a TIFF tag; None for other formats."""
    value: object = getattr(image, "tag_v2", {}).get(number)
    if isinstance(value, tuple):
        value = next(iter(value), None)
    return value if isinstance(value, int) else None


def _unknown_range(image: Image.Image, what: str, example: str) -> str:
    return (
        f"its pixels are {what} (mode {image.mode}), and nothing says how bright the "
        f"brightest is: set data.white, {example}"
    )
