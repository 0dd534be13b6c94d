"""A look at a few images of a folder, for what a user would want to know before training.

Whatever is found here is decoded as `pixels` says all the same; a file that cannot be read is named
when its turn comes.
"""

import numpy as np
from PIL import ExifTags, Image

from fastkd.data.sources.folder import FolderIndex
from fastkd.data.sources.pixels import is_deep
from fastkd.errors import UserError

__all__ = ["survey"]

_LOOKS = 16
_UPRIGHT = 1


def survey(index: FolderIndex) -> list[str]:
    """Sentences on orientation, transparency and depth, where a key would change what is seen."""
    positions = np.unique(np.linspace(0, len(index) - 1, _LOOKS).astype(int)).tolist()
    decoding = index.decoding
    turned = see_through = 0
    brightest: list[int] = []
    for sample in positions:
        try:
            found = index.read(sample, _habits)
        except UserError:
            continue
        turned += found[0]
        see_through += found[1]
        if found[2] is not None:
            brightest.append(found[2])
    few = f"of {len(positions)} images looked at in {index.name}"
    remarks: list[str] = []
    if turned and decoding.exif == "ignore":
        remarks.append(
            f"{turned} {few} are stored rotated (EXIF); data.exif=apply turns them upright"
        )
    if see_through and decoding.alpha == "drop":
        remarks.append(
            f"{see_through} {few} have transparent pixels, of which the hidden colour is shown; "
            "data.alpha=white shows white instead"
        )
    if brightest and decoding.white is None and (peak := max(brightest)) < 4096:
        bits = max(9, peak.bit_length())
        remarks.append(
            f"{len(brightest)} {few} have 16 bits a pixel, and none is brighter than {peak} of "
            f"65535, so all are nearly black; data.white={(1 << bits) - 1} uses the whole range"
        )
    return remarks


def _habits(image: Image.Image) -> tuple[bool, bool, int | None]:
    """Whether it is stored rotated, whether pixels are transparent, and a 16-bit one's peak."""
    # Pillow turns a TIFF while it decodes, and ImageFolder's users see that too.
    orientation = image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT)
    turned = image.format != "TIFF" and orientation != _UPRIGHT
    see_through = False
    if image.has_transparency_data and not is_deep(image):
        opacity = image.convert("RGBA").getchannel("A").getextrema()[0]
        see_through = isinstance(opacity, int | float) and opacity < 255
    peak = int(np.asarray(image).max()) if image.mode.startswith("I;16") else None
    return turned, see_through, peak
