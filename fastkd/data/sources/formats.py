"""The image formats that are opened, and the file names by which images are known.

This is an allow-list. Pillow also reads formats that start a program (EPS: Ghostscript), open
whatever lies inside them (IPTC), or are drawings and measurements rather than pictures; a file's
name does not decide what Pillow takes it for, so a data set could bring them in under `.jpg`.
"""

import functools
import os

from PIL import Image

__all__ = [
    "EXTENSIONS",
    "FORMATS",
    "foreign_format",
    "formats_for",
    "missing_format",
    "suffix",
]

FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "DIB": (".dib",),
    "ICO": (".ico",),
    "ICNS": (".icns",),
    "CUR": (".cur",),
    "PSD": (".psd",),
    "QOI": (".qoi",),
    "PCX": (".pcx",),
    "DCX": (".dcx",),
    "DDS": (".dds",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "SUN": (".ras",),
    "FLI": (".fli", ".flc"),
    "BLP": (".blp",),
    "FTEX": (".ftc", ".ftu"),
    "GBR": (".gbr",),
    "MSP": (".msp",),
    "PIXAR": (".pxr",),
    "XBM": (".xbm",),
    "XPM": (".xpm",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
    "IM": (".im",),
    "PCD": (".pcd",),
}
"""Pillow's name of a format -> the extensions of its files, in small letters."""

EXTENSIONS = frozenset(extension for each in FORMATS.values() for extension in each)

# No signature: Pillow takes nearly any file for one of these, so the name must say so.
_BY_NAME_ONLY = ("TGA", "IM", "PCD")

_RUNS_PROGRAMS = "which is not opened, because drawing it can start another program"
_NO_PICTURE = "which is not a picture that is read here"
_FOREIGN = (
    (b"%!PS", "PostScript (EPS)", _RUNS_PROGRAMS),
    (b"\xc5\xd0\xd3\xc6", "PostScript (EPS)", _RUNS_PROGRAMS),
    (b"%PDF", "PDF", _RUNS_PROGRAMS),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile (WMF)", _RUNS_PROGRAMS),
    (b"\x01\x00\x00\x00", "a Windows metafile (EMF)", _RUNS_PROGRAMS),
    (b"\x00\x00\x01\xb3", "an MPEG video", _NO_PICTURE),
    (b"\x00\x00\x01\xba", "an MPEG video", _NO_PICTURE),
    (b"\x1c", "IPTC", "which is not opened, because it can hold any other format"),
    (b"\x89HDF", "HDF5", _NO_PICTURE),
    (b"SIMPLE  =", "FITS", "whose scale of brightness Pillow does not read"),
    (b"GRIB", "GRIB", _NO_PICTURE),
    (b"BUFR", "BUFR", _NO_PICTURE),
    (b"version https://git-lfs", "a Git LFS pointer", "not the picture: run `git lfs pull`"),
    (b"<svg", "SVG", "a drawing"),
    (b"<?xml", "XML or SVG", "not a picture"),
    (b"<!DOCTYPE", "an HTML page", "not a picture: was its download refused?"),
    (b"<html", "an HTML page", "not a picture: was its download refused?"),
)


def suffix(name: str) -> str:
    """The extension of a file name in small letters, with its dot; "" without one."""
    return os.path.splitext(name)[1].lower()


@functools.cache
def formats_for(extension: str) -> tuple[str, ...]:
    """The formats that a file with this extension is tried as; all, except for a few."""
    Image.init()
    return tuple(
        name
        for name, extensions in FORMATS.items()
        if name in Image.OPEN and (name not in _BY_NAME_ONLY or extension in extensions)
    )


def missing_format(extension: str) -> str | None:
    """The format that files with this extension have, if this Pillow does not read it."""
    Image.init()
    owners = [name for name, extensions in FORMATS.items() if extension in extensions]
    return next((name for name in owners if name not in Image.OPEN), None)


def foreign_format(start: bytes) -> str | None:
    """What a refused file is by its first bytes, as a half sentence; None if they say nothing."""
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"mif1", b"msf1"):
        return "HEIC, which Pillow does not read"
    for signature, name, why in _FOREIGN:
        if start.startswith(signature):
            return f"{name}, {why}"
    return None
