"""Which files are opened: every raster format of Pillow, and nothing that runs a program."""

import os
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastkd.data import open_split
from fastkd.data.sources.decode import open_rgb
from fastkd.data.sources.formats import EXTENSIONS, FORMATS
from fastkd.data.sources.pixels import Decoding
from fastkd.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# What Pillow reads by name but is left out, and why.
REFUSED = {
    "EPS": "runs Ghostscript",
    "WMF": "a drawing that the system draws",
    "MPEG": "video, not decoded",
    "IPTC": "opens whatever lies inside",
    "FITS": "measurements whose scale is not read",
    "BUFR": "weather data, not decoded",
    "GRIB": "weather data, not decoded",
    "HDF5": "arrays, not decoded",
    "PDF": "not decoded",
    "PALM": "not decoded",
    "FPX": "needs another package",
    "MIC": "needs another package",
    "MPO": "read as JPEG",
}

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
showpage
%%EOF
"""


def test_every_extension_of_pillow_is_read_or_refused_for_a_reason():
    Image.init()
    for extension, name in Image.registered_extensions().items():
        if name in REFUSED and extension not in EXTENSIONS:
            assert name not in FORMATS
        elif name in Image.OPEN:
            assert extension in EXTENSIONS, f"{extension} of {name}"
    assert not set(FORMATS) & set(REFUSED)
    assert len(EXTENSIONS) == sum(map(len, FORMATS.values())) > 50


SAVED = sorted(
    extension
    for extension in EXTENSIONS - {".icns", ".cur", ".ico", ".xbm", ".msp", ".pbm", ".pfm"}
    if Image.registered_extensions().get(extension) in Image.SAVE
)


@pytest.mark.parametrize("extension", [*SAVED, ".Jpe", ".JFIF"])
def test_a_colour_comes_back_from_every_format_that_pillow_writes(tmp_path, extension):
    path = tmp_path / f"a{extension}"
    image = Image.new("RGB", (16, 16), (200, 60, 20))
    kind = Image.registered_extensions()[extension.lower()]
    if kind == "BLP":
        image = image.quantize(4)
    image.save(path, format=kind)
    pixels = np.asarray(open_rgb(path)).astype(int)
    exact = kind not in ("JPEG", "WEBP", "AVIF", "MPO", "GIF", "BLP")
    np.testing.assert_allclose(pixels[8, 8], [200, 60, 20], atol=0 if exact else 4)


@pytest.mark.parametrize("extension", [".ico", ".icns", ".pbm", ".msp"])
def test_the_remaining_formats_that_pillow_writes(tmp_path, extension):
    mode = "1" if extension in (".pbm", ".msp") else "RGB"
    Image.new(mode, (32, 32), "white").save(tmp_path / f"a{extension}")
    assert np.asarray(open_rgb(tmp_path / f"a{extension}")).min() == 255


def test_the_name_does_not_matter_where_the_content_tells(tmp_path):
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "a.png")
    for name in ("a.jpg", "a.gif", "a.tga", "a"):
        (tmp_path / "a.png").rename(tmp_path / name)
        assert open_rgb(tmp_path / name).getpixel((0, 0)) == (1, 2, 3)
        (tmp_path / name).rename(tmp_path / "a.png")


def iptc_with(content: bytes) -> bytes:
    """An IPTC record whose picture is any file; Pillow opens what lies inside."""

    def field(number: int, dataset: int, value: bytes) -> bytes:
        return struct.pack(">BBBH", 0x1C, number, dataset, len(value)) + value

    return (
        field(3, 60, b"\x01\x00")
        + field(3, 65, b"\x01")
        + field(3, 20, struct.pack(">I", 8))
        + field(3, 30, struct.pack(">I", 8))
        + field(3, 120, b"\x05")
        + field(8, 10, content)
    )


DRAWINGS = {
    "eps": (EPS, "PostScript"),
    "eps with a preview": (
        b"\xc5\xd0\xd3\xc6" + struct.pack("<6IH", 32, len(EPS), 0, 0, 0, 0, 0xFFFF) + b"\0\0" + EPS,
        "PostScript",
    ),
    "pdf": (b"%PDF-1.4\n1 0 obj\n", "PDF"),
    "wmf": (b"\xd7\xcd\xc6\x9a\0\0" + bytes(60), "WMF"),
    "emf": (b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(60), "EMF"),
    "mpeg": (b"\0\0\x01\xb3" + bytes(60), "MPEG"),
    "iptc with eps": (iptc_with(EPS), "IPTC"),
    "fits": (b"SIMPLE  =" + bytes(100), "FITS"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "html": (b"<!DOCTYPE html><html>404</html>", "HTML"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
}


@pytest.fixture
def trap(tmp_path, monkeypatch) -> Path:
    """Programs that Pillow might start, each of which would leave a file behind."""
    programs, sprung = tmp_path / "bin", tmp_path / "sprung"
    programs.mkdir()
    for name in ("gs", "gswin64c", "gswin32c", "djpeg", "ppmquant", "inkscape", "convert"):
        (programs / name).write_text(f"#!/bin/sh\necho {name} >> {sprung}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return sprung


@pytest.mark.parametrize("content", [EPS, iptc_with(EPS)], ids=["eps", "iptc with eps"])
def test_the_trap_works(tmp_path, trap, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(OSError), Image.open(tmp_path / "a.jpg") as image:  # noqa: PT011
        image.load()
    assert "gs" in trap.read_text()


@pytest.mark.parametrize("kind", DRAWINGS)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tga", ".eps"])
def test_drawings_run_nothing_and_are_refused_by_name(tmp_path, trap, kind, suffix):
    content, name = DRAWINGS[kind]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=rf"a\{suffix}: it is .*{name}.*convert it to PNG or remove"
    ):
        open_rgb(path)
    assert not trap.exists()


def test_a_drawing_in_a_data_set_is_named_and_runs_nothing(make_folder, trap):
    root = make_folder()
    (root / "train" / "cow" / "001.png").write_bytes(EPS)
    with pytest.raises(UserError, match=r"cow/001\.png: it is PostScript \(EPS\), which is not"):
        open_split("folder", root)
    assert not trap.exists()


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device"])
def test_what_is_no_file_is_refused_without_waiting(tmp_path, kind, monkeypatch):
    path = tmp_path / "a.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # the name of a socket is short
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("a.png")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"a\.png is not a regular file"):
        open_rgb(path)


def test_a_file_that_may_not_be_read(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    if os.access(tmp_path / "a.png", os.R_OK):
        pytest.skip("root may read everything")
    with pytest.raises(UserError, match=r"a\.png cannot be read: Permission denied"):
        open_rgb(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["new\nline.png", "esc\x1b[31m.png", "byte\udce9.png", " a.png"])
def test_names_that_cannot_be_seen_are_shown_escaped(tmp_path, name):
    (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        open_rgb(tmp_path / name)
    message = str(error.value)
    assert message.isprintable() and message.encode()
    assert repr(name)[1:-1] in message


def test_the_page_on_data_lists_the_extensions():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    listed = page.partition("upper case:\n")[2].partition("\n- ")[0]
    assert listed.strip().strip("`").split() == [one for each in FORMATS.values() for one in each]


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """Cut short, with other bytes in places, or with a piece left out."""
    body = bytearray(content)
    kind = random.integers(3)
    if kind == 0:
        return bytes(body[: random.integers(len(body))])
    if kind == 1:
        for place in random.integers(0, len(body), random.integers(1, 20)):
            body[place] = random.integers(256)
        return bytes(body)
    start, stop = sorted(random.integers(0, len(body), 2))
    return bytes(body[:start] + body[stop:])


@pytest.mark.parametrize("extension", [one for one in SAVED if one not in (".avifs", ".blp")])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_named_or_read_and_nothing_else(tmp_path, trap, extension):
    kind = Image.registered_extensions()[extension]
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole", format=kind)
    content = (tmp_path / "whole").read_bytes()
    random, path = np.random.default_rng(2), tmp_path / f"a\n{extension}"
    for _ in range(25):
        path.write_bytes(damaged(content, random))
        try:
            image = open_rgb(path, Decoding(white=1.0, max_pixels=1 << 20))
            assert image.mode == "RGB" and np.asarray(image).shape[2] == 3
        except UserError as error:
            message = str(error)
            assert r"a\n" in message and message.isprintable() and len(message) < 1000
    assert not trap.exists()
