"""What comes out of every mode and depth that an image file can have, against numbers made here."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from fastkd.data import open_source
from fastkd.data.sources.cache import decoded_images
from fastkd.data.sources.decode import open_rgb
from fastkd.data.sources.pixels import Decoding
from fastkd.errors import UserError

# Pillow announces the end of a few formats and arguments that are used here to write files.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

RAMP_16 = np.linspace(0, 65535, 32 * 32).round().astype(np.uint16).reshape(32, 32)
STEPS_8 = np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey(path: Path, **keys) -> np.ndarray:
    pixels = np.asarray(open_rgb(path, Decoding(**keys)))
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].astype(int)


def tiff(path: Path, values: np.ndarray, bits: int, *, photometric=1, order="<", packed=None):
    """A TIFF of one grey strip, written by hand: what cameras write and Pillow does not."""
    data = packed or values.astype(f"{order}u{bits // 8}").tobytes()
    kind = 3 if values.dtype.kind == "f" else 2 if values.dtype.kind == "i" else 1
    if packed is None and kind == 3:
        data = values.astype(f"{order}f4").tobytes()
    if packed is None and kind == 2:
        data = values.astype(f"{order}i{bits // 8}").tobytes()
    height, width = values.shape
    tags = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, height),
        (279, len(data)),
        (339, kind),
    ]
    directory = struct.pack(f"{order}H", len(tags)) + b"".join(
        struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags
    )
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(f"{order}HI", 42, 8 + len(data))
    path.write_bytes(head + data + directory + struct.pack(f"{order}I", 0))
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "a.jp2", "a.im"])
def test_sixteen_bits_of_grey_give_their_upper_eight(tmp_path, name):
    Image.fromarray(RAMP_16).save(tmp_path / name)
    np.testing.assert_array_equal(grey(tmp_path / name), RAMP_16 // 256)
    assert len(np.unique(grey(tmp_path / name))) == 256


@pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
def test_byte_order_and_white_is_zero(tmp_path, order):
    plain = tiff(tmp_path / "a.tif", RAMP_16, 16, order=order)
    np.testing.assert_array_equal(grey(plain), RAMP_16 >> 8)
    if order == "<":
        negative = tiff(tmp_path / "b.tif", RAMP_16, 16, photometric=0)
        np.testing.assert_array_equal(grey(negative), (65535 - RAMP_16.astype(int)) >> 8)


def test_twelve_bits_packed_in_a_tiff_use_the_whole_range(tmp_path):
    values = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)
    pairs = values.reshape(-1, 2).astype(int)
    packed = bytes(byte for a, b in pairs for byte in (a >> 4, (a & 15) << 4 | b >> 8, b & 255))
    path = tiff(tmp_path / "a.tif", values, 12, packed=packed)
    np.testing.assert_array_equal(grey(path), values >> 4)


@pytest.mark.parametrize(("bits", "white"), [(12, 4095), (10, 1023), (14, 16383)])
def test_fewer_bits_in_sixteen_take_the_key(tmp_path, bits, white):
    values = (np.arange(256, dtype=np.uint16) << (bits - 8)).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(grey(tmp_path / "a.png", white=white), STEPS_8)
    # brighter than white is white
    Image.fromarray(values * 4).save(tmp_path / "b.png")
    assert grey(tmp_path / "b.png", white=white)[-1, -1] == 255


def test_integers_of_unknown_range_are_refused_or_scaled(tmp_path):
    values = np.array([[0, 1 << 20], [1 << 23, (1 << 24) - 1]], dtype=np.int32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: its pixels are integers \(mode I\).*data\.white"):
        open_rgb(tmp_path / "a.tif")
    np.testing.assert_array_equal(
        grey(tmp_path / "a.tif", white=(1 << 24) - 1), [[0, 16], [128, 255]]
    )
    signed = tiff(tmp_path / "b.tif", np.array([[-300, 0], [1000, 2000]], dtype=np.int16), 16)
    with pytest.raises(UserError, match=r"b\.tif: its pixels are integers"):
        open_rgb(signed)
    np.testing.assert_array_equal(grey(signed, white=1999), [[0, 0], [128, 255]])
    unsigned = tiff(tmp_path / "c.tif", np.array([[0, 1 << 16]], dtype=np.uint32), 32)
    with pytest.raises(UserError, match="mode I"):
        open_rgb(unsigned)


@pytest.mark.parametrize("name", ["a.tif", "a.pfm", "a.im"])
def test_floats_are_refused_or_scaled(tmp_path, name):
    values = np.array([[0.0, 0.25], [0.5, 1.0]], dtype=np.float32)
    Image.fromarray(values).save(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: its pixels are floats \(mode F\).*data\.white"):
        open_rgb(tmp_path / name)
    np.testing.assert_array_equal(grey(tmp_path / name, white=1.0), [[0, 64], [128, 255]])
    np.testing.assert_array_equal(grey(tmp_path / name, white=0.5), [[0, 128], [255, 255]])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_floats_that_are_no_numbers_are_refused(tmp_path, value):
    Image.fromarray(np.array([[0.0, value]], dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: its floats \(mode F\) are not all finite"):
        open_rgb(tmp_path / "a.tif", Decoding(white=1.0))


def png(path: Path, values: np.ndarray, colour_type: int) -> Path:
    """A 16-bit PNG of several channels, which Pillow does not write."""
    height, width = values.shape[:2]
    rows = values.astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_sixteen_bits_of_colour_give_their_upper_eight(tmp_path, colour_type, channels):
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels)).astype(np.uint16)
    path = png(tmp_path / "a.png", values, colour_type)
    colours = values[..., :3] if channels > 2 else values[..., [0, 0, 0]]
    np.testing.assert_array_equal(np.asarray(open_rgb(path)), colours >> 8)
    with pytest.raises(UserError, match=r"a\.png: it has 16 bits in each of its colours"):
        open_rgb(path, Decoding(white=4095))


@pytest.mark.parametrize("suffix", [".tif", ".jpg"])
def test_cmyk_is_ink_on_white(tmp_path, suffix):
    inks = np.zeros((16, 16, 4), dtype=np.uint8)
    inks[..., 0], inks[..., 2], inks[..., 3] = 200, 90, 60
    path = tmp_path / f"a{suffix}"
    Image.fromarray(inks, "CMYK").save(path, **({"quality": 100} if suffix == ".jpg" else {}))
    expected = [(255 - ink) * (255 - 60) / 255 for ink in (200, 0, 90)]
    np.testing.assert_allclose(np.asarray(open_rgb(path))[8, 8], expected, atol=2)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("YCbCr", (128, 128, 128), (128, 128, 128)),
        ("YCbCr", (76, 85, 255), (254, 0, 0)),  # red by JFIF's formula
        ("LAB", (255, 128, 128), (255, 255, 255)),
        ("LAB", (0, 128, 128), (0, 0, 0)),
    ],
)
def test_other_colour_spaces(tmp_path, mode, colour, expected):
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as image:
        if image.mode != mode:
            pytest.skip(f"Pillow {PIL.__version__} opens such a file as {image.mode}")
    np.testing.assert_allclose(np.asarray(open_rgb(tmp_path / "a.tif"))[0, 0], expected, atol=1)


def test_one_bit_and_few_bits(tmp_path):
    Image.fromarray(np.eye(8, dtype=bool)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(grey(tmp_path / "a.png"), np.eye(8) * 255)
    Image.fromarray(np.eye(8, dtype=bool)).save(tmp_path / "a.pbm")
    np.testing.assert_array_equal(grey(tmp_path / "a.pbm"), np.eye(8) * 255)
    (tmp_path / "b.pgm").write_bytes(b"P5 2 1 3\n\x01\x03")
    np.testing.assert_array_equal(grey(tmp_path / "b.pgm"), [[85, 255]])


def drawing(mode: str) -> Image.Image:
    """Black on transparent: the colour is black all over, the picture is in the opacity."""
    opacity = np.zeros((8, 8), dtype=np.uint8)
    opacity[2:6, 2:6] = 255
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[..., 3] = opacity
    image = Image.fromarray(pixels, "RGBA")
    if mode == "P":
        indexed = Image.fromarray((opacity > 0).astype(np.uint8), "P")
        indexed.putpalette([0, 0, 0, 0, 0, 0])
        indexed.info["transparency"] = 0
        return indexed
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "name"),
    [("RGBA", "a.png"), ("LA", "a.png"), ("P", "a.gif"), ("RGBA", "a.webp"), ("RGBA", "a.tif")],
)
def test_transparency_is_dropped_or_lies_over_a_ground(tmp_path, mode, name):
    image = drawing(mode)
    how = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    if mode == "P":
        how = {"transparency": 0}
    image.save(tmp_path / name, **how)
    ink = np.zeros((8, 8), dtype=bool)
    ink[2:6, 2:6] = True
    assert grey(tmp_path / name).max() == 0
    np.testing.assert_array_equal(grey(tmp_path / name, alpha="white"), np.where(ink, 0, 255))
    np.testing.assert_array_equal(grey(tmp_path / name, alpha="black"), np.zeros((8, 8)))


def test_half_transparent_colours(tmp_path):
    Image.new("RGBA", (4, 4), (200, 100, 0, 128)).save(tmp_path / "a.png")
    assert open_rgb(tmp_path / "a.png").getpixel((0, 0)) == (200, 100, 0)
    over = np.asarray(open_rgb(tmp_path / "a.png", Decoding(alpha="white")))[0, 0]
    share = 128 / 255
    np.testing.assert_allclose(over, [255 + (c - 255) * share for c in (200, 100, 0)], atol=1)


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (9, 8, 7)), ("L", 9), ("I;16", 2600)])
def test_one_colour_that_counts_as_transparent(tmp_path, mode, colour):
    image = Image.new(mode, (2, 1), colour)
    image.putpixel((1, 0), 5000 if mode == "I;16" else 70 if mode == "L" else (70, 70, 70))
    image.save(tmp_path / "a.png", transparency=colour)
    pixels = np.asarray(open_rgb(tmp_path / "a.png", Decoding(alpha="white")))
    assert pixels[0, 0].tolist() == [255] * 3
    assert pixels[0, 1].tolist() == [5000 >> 8 if mode == "I;16" else 70] * 3
    dropped = np.asarray(open_rgb(tmp_path / "a.png"))[0, 0]
    assert dropped.tolist() == {"RGB": [9, 8, 7], "L": [9] * 3, "I;16": [10] * 3}[mode]


def test_palette_with_transparent_entries_keeps_its_colours_without_a_warning(tmp_path, recwarn):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "a.png", transparency=bytes([255, 0, 128]))
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])
    pixels = np.asarray(open_rgb(tmp_path / "a.png"))
    np.testing.assert_array_equal(pixels, colours[[[0, 1], [2, 1]]])
    assert not recwarn.list


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.gif", {}),
        ("a.tif", {}),
        ("a.png", {}),
        ("a.webp", {"lossless": True}),
        ("a.mpo", {"quality": 100}),
    ],
)
def test_of_several_frames_the_first(tmp_path, name, how):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **how)
    with Image.open(tmp_path / name) as image:
        assert getattr(image, "n_frames", 1) == 3
    np.testing.assert_allclose(np.asarray(open_rgb(tmp_path / name))[8, 8], [255, 0, 0], atol=2)


CORNERS = np.array([[0, 80], [160, 240]], dtype=np.uint8)
UPRIGHT = {  # what EXIF's number says of the stored rows and columns (CIPA DC-008, 4.6.5)
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.T,
    6: CORNERS.T[:, ::-1],
    7: CORNERS[::-1, ::-1].T,
    8: CORNERS.T[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_exif_orientation_is_ignored_as_in_torchvision_or_applied(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.kron(CORNERS, np.ones((16, 24), dtype=np.uint8)))
    image.save(tmp_path / name, exif=exif, **({} if name == "a.png" else {"quality": 100}))

    def corners(**keys):
        pixels = grey(tmp_path / name, **keys)
        height, width = pixels.shape
        return pixels[8 :: height // 2, 8 :: width // 2][:2, :2]

    np.testing.assert_allclose(corners(), CORNERS, atol=3)
    np.testing.assert_allclose(corners(exif="apply"), UPRIGHT[orientation], atol=3)
    turned = orientation >= 5
    assert grey(tmp_path / name, exif="apply").shape == ((48, 32) if turned else (32, 48))


def with_long_text(kind: str, size: int) -> bytes:
    from PIL import PngImagePlugin

    words, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    if kind == "itxt":
        words.add_itxt("comment", "x" * size, zip=True)
    elif kind == "ztxt":
        words.add_text("comment", "x" * size, zip=True)
    for number in range(70 if kind == "many" else 0):
        words.add_text(f"c{number}", "x" * (1 << 20))
    profile = b"\0" * size if kind == "iccp" else None
    image = Image.fromarray(STEPS_8)
    image.save(buffer, "PNG", pnginfo=words, icc_profile=profile)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["itxt", "ztxt", "iccp", "many"])
def test_long_words_in_a_png_do_not_hide_the_picture(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(with_long_text(kind, 2_000_000))
    with pytest.raises(ValueError, match="MAX_TEXT"):  # noqa: SIM117
        with Image.open(tmp_path / "a.png") as image:
            image.load()
    np.testing.assert_array_equal(grey(tmp_path / "a.png"), STEPS_8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_too_many_pixels_name_the_key_and_the_number_that_helps(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = tmp_path / f"a.{suffix}"
    Image.new("L", (30, 20), 7).save(path)
    for limit in (599, 250):  # beyond our limit; beyond twice of Pillow's
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(UserError, match=r"has 600 pixels.*set data\.max_pixels=600 "):
            open_rgb(path, Decoding(max_pixels=limit))
    assert (grey(path, max_pixels=600) == 7).all()


def test_the_default_limit_is_pillows(tmp_path):
    Image.new("1", (13_500, 13_500)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: it has 182250000 pixels.*=182250000"):
        open_rgb(tmp_path / "a.png")


def test_decoded_sets_of_other_keys_are_other_sets(make_folder):
    root = make_folder(classes=("a", "b"), per_class=1, size=(8, 8))
    for split in ("train", "val"):
        for name in ("a", "b"):
            drawing("RGBA").save(root / split / name / "000.png")
    for alpha, brightest in (("drop", 0), ("white", 255), ("black", 0), ("white", 255)):
        index = open_source("folder", root, decoding=Decoding(alpha=alpha))
        assert decoded_images(index, None).max() == brightest
