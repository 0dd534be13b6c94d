"""From image files to RGB pixels, by Pillow.

Only the formats of `formats` are opened; how their pixels become RGB is said in `pixels`.
"""

import errno
import os
import re
import stat
from collections.abc import Callable
from io import BytesIO
from os import PathLike
from typing import IO, TypeVar

from PIL import Image, UnidentifiedImageError
from PIL import __version__ as pillow_version

from fastkd.data.sources.formats import foreign_format, formats_for, missing_format, suffix
from fastkd.data.sources.pixels import DEFAULTS, Decoding, to_rgb
from fastkd.errors import RunFailed, UserError
from fastkd.printable import shown
from fastkd.storage.atomic import sentence

__all__ = ["broken_link", "open_file", "open_rgb", "read_image"]

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_WORDS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")

# No fault of the file: another one could not be opened either.
_OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_Found = TypeVar("_Found")


def open_rgb(path: str | PathLike[str], decoding: Decoding = DEFAULTS) -> Image.Image:
    """Decode an image file to RGB.

    Raises:
        UserError: the file is missing, damaged, too large or of a format that is not opened, or
            nothing says how its pixels become RGB; the message names it.
    """
    with open_file(path) as stream:
        return read_image(path, stream, decoding, lambda image: to_rgb(image, decoding))


def open_file(path: str | PathLike[str]) -> IO[bytes]:
    """The file of an image. UserError: it cannot be opened, or is no file."""
    try:
        # Opening a pipe would wait for whoever writes to it.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{shown(path)} is not a regular file, so no image can be read from it")
        return open(path, "rb")
    except OSError as error:
        if error.errno in _OF_THE_MACHINE:
            raise RunFailed(sentence(error)) from error
        if said := broken_link(path):
            raise UserError(said) from error
        reason = error.strerror or type(error).__name__
        raise UserError(f"the image {shown(path)} cannot be read: {reason}") from error


def broken_link(path: str | PathLike[str]) -> str | None:
    """A sentence on a link that leads nowhere; None for everything else."""
    if not os.path.islink(path) or os.path.exists(path):
        return None
    return (
        f"{shown(path)} is a link to {shown(os.readlink(path))}, which is not there; remove the "
        "link, or bring back what it leads to"
    )


def read_image(
    name: str | PathLike[str],
    stream: IO[bytes],
    decoding: Decoding,
    use: Callable[[Image.Image], _Found],
) -> _Found:
    """What `use` makes of the opened, not yet decoded image.

    name: of its file, for messages; its extension says which formats are tried.

    Raises:
        UserError: as `open_rgb`, also for whatever goes wrong in `use`.
    """
    name = os.fsdecode(name)
    try:
        return _opened(stream, formats_for(suffix(name)), decoding, use)
    except UserError as error:
        raise UserError(f"cannot read the image {shown(name)}: {error}") from error
    except UnidentifiedImageError as error:
        raise UserError(_unidentified(name, stream)) from error
    except MemoryError:
        raise
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
