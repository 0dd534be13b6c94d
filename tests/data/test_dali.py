"""The DALI backend against the torch backend: ids, areas and flips equal, colours up to rounding.

Needs the extra `dali`; CI installs it.
"""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd.data import FolderIndex, ImageSet, Loading, TorchLoader, open_source
from fastkd.data.geometry import Geometry
from fastkd.data.picture_views import PictureView
from fastkd.errors import UserError
from fastkd.storage.facts import Framing

from .test_torch_loader import assert_same, loading

pytest.importorskip("nvidia.dali", reason='needs pip install "fastkd[dali]"')

from fastkd.data.loaders.dali_loader import DaliLoader, for_dali

PLACE = {"crop": "resized", "image_size": 24}


def smooth(number: int, size: tuple[int, int]) -> Image.Image:
    """Gradients and a few shapes: what a photograph is to a resize filter, unlike noise."""
    width, height = size
    random = np.random.default_rng(number)
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(6 * (a * across + b * down) + c) for a, b, c in random.uniform(-1, 1, (3, 3))]
    return Image.fromarray(np.uint8(127.5 + 120 * np.stack(waves, -1)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of JPEGs of many sizes."""
    random = np.random.default_rng(5)
    for split, per_class in (("train", 11), ("val", 6)):
        for label, name in enumerate(("ant", "bee")):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for n in range(per_class):
                size = tuple(random.integers(30, 120, 2).tolist())
                smooth(100 * label + n, size).save(folder / f"{n:02d}.jpg", quality=92)
    return tmp_path / "set"


def both(
    source, views=None, *, framing=None, crop="resized", image_size=24, skips=False, **changes
):
    """The same loading by DALI and by torch."""
    more = {"crop": crop, "image_size": image_size, "framing": framing, "skips": skips}
    made = [kind(source, loading(**changes), **more) for kind in (DaliLoader, TorchLoader)]
    return [one if views is None else one.with_views(views) for one in made]


def levels(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Differences in levels of 0..255."""
    std = torch.tensor((0.2, 0.25, 0.3))[:, None, None]
    return ((one - other) * std * 255).abs()


@pytest.mark.parametrize("crop", ["resized", "pad", "none"])
def test_the_same_ids_areas_and_flips(root, crop):
    ours, theirs = both(open_source("folder", root), crop=crop)
    for epoch in (0, 3):
        pairs = list(zip(ours.epoch(epoch), theirs.epoch(epoch), strict=True))
        assert len(pairs) == 4
        for a, b in pairs:
            assert torch.equal(a.index_N, b.index_N) and torch.equal(a.labels_N, b.labels_N)
            difference = levels(a.images_NCHW, b.images_NCHW)
            # A pixel that is off by one column would differ by far more.
            assert difference.mean() < 0.6 and difference.max() < 12


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
@pytest.mark.parametrize("mode", ["center", "squash"])
def test_the_evaluation_shows_the_same_square(root, interpolation, mode):
    framing = Framing(resize=30, crop=24, interpolation=interpolation, mode=mode)
    source = open_source("folder", root, "val")
    ours, theirs = both(source, framing=framing, train=False)
    found = torch.cat([b.images_NCHW for b in ours.epoch(0)])
    expected = torch.cat([b.images_NCHW for b in theirs.epoch(0)])
    assert levels(found, expected).mean() < 0.6
    if interpolation in ("lanczos", "nearest"):  # Pillow's own work
        assert torch.equal(found, expected)


@pytest.mark.parametrize("num", [1, 2, 7, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 5, 12])
def test_an_evaluation_shows_every_id_once(root, num, ranks, batch):
    source = open_source("folder", root, "val").take(np.arange(num))
    shown: list[int] = []
    for rank in range(ranks):
        data = DaliLoader(
            source,
            loading(rank, ranks, batch_size=batch, train=False),
            image_size=24,
            crop="none",
        )
        shown += [n for part in data.epoch(0) for n in part.index_N.tolist()]
    assert sorted(shown) == list(range(num))


def test_an_epoch_goes_on_where_it_stopped_to_the_byte(root):
    source = open_source("folder", root)
    ours = both(source)[0]
    whole = list(ours.epoch(2))
    assert_same(list(ours.epoch(2, 2)), whole[2:])
    assert_same(list(both(source)[0].epoch(2, 3)), whole[3:])
    # After an early end too.
    for stop in (1, 2, 3):
        batches = ours.epoch(2)
        for _ in range(stop):
            next(batches)
        batches.close()
        assert_same(list(ours.epoch(2)), whole)


def test_a_sample_looks_the_same_for_any_batch_ranks_and_threads(root):
    source = open_source("folder", root)
    by_id = {}
    for batch in both(source, batch_size=22, drop_last=False)[0].epoch(1):
        by_id = dict(zip(batch.index_N.tolist(), batch.images_NCHW, strict=True))
    for rank in (0, 1):
        data = DaliLoader(source, loading(rank, 2, batch_size=6), workers=3, **PLACE)
        for batch in data.epoch(1):
            for sample, image in zip(batch.index_N.tolist(), batch.images_NCHW, strict=True):
                assert torch.equal(image, by_id[sample])


def test_second_views(root):
    source = open_source("folder", root)
    for crop in ("resized", "pad"):
        ours, theirs = both(source, PictureView("cropflip", 2), crop=crop)
        for a, b in zip(ours.epoch(1), theirs.epoch(1), strict=True):
            assert levels(a.second_NCHW, b.second_NCHW).mean() < 0.6
    # RandAugment acts on what x shows, and some of its operations multiply differences.
    ours, theirs = both(source, PictureView("randaugment", 2), crop="resized")
    for a, b in zip(ours.epoch(1), theirs.epoch(1), strict=True):
        assert levels(a.second_NCHW, b.second_NCHW).mean() < 1.5


def odd_files(folder: Path) -> None:
    """Whatever Pillow reads in a way of its own."""
    picture = smooth(1, (50, 40))
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("L").save(folder / "grey.jpg")
    picture.convert("P").save(folder / "palette.png")
    picture.quantize(7).save(folder / "few.gif")
    seen = picture.convert("RGBA")
    seen.putalpha(120)
    seen.save(folder / "alpha.png")
    Image.fromarray((np.arange(2000, dtype=np.uint16) * 30).reshape(40, 50)).save(folder / "16.png")
    picture.save(folder / "a.webp")
    picture.save(folder / "b.bmp")
    picture.save(folder / "c.tif")
    exif = Image.Exif()
    exif[274] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    picture.save(folder / "progressive.jpg", progressive=True, quality=95)
    stream = io.BytesIO()
    picture.save(stream, "JPEG")
    (folder / "behind.jpg").write_bytes(stream.getvalue() + b"more bytes")
    Image.new("RGB", (1, 900), "red").save(folder / "line.png")


def test_odd_files_look_as_in_the_torch_backend(root):
    odd_files(root / "train" / "ant")
    source = open_source("folder", root)
    assert isinstance(source, FolderIndex)
    ours, theirs = both(source, crop="none", batch_size=len(source), drop_last=False)
    (a,), (b,) = ours.epoch(0), theirs.epoch(0)
    names = [source.file(n) for n in a.index_N.tolist()]
    for name, one, other in zip(names, a.images_NCHW, b.images_NCHW, strict=True):
        assert levels(one, other).mean() < 0.8, name


def test_exif_is_applied_where_it_is_asked_for(root):
    from dataclasses import replace

    from fastkd.data.sources.pixels import Decoding

    odd_files(root / "train" / "ant")
    source = replace(open_source("folder", root), decoding=Decoding(exif="apply"))
    turned = next(n for n in range(len(source)) if source.file(n).endswith("turned.jpg"))
    content, size = for_dali(source, turned)
    assert size == (40, 50) and content.startswith(b"P6 40 50 255\n")


def test_damaged_files_are_named_or_skipped(root):
    folder = root / "train" / "ant"
    whole = (folder / "03.jpg").read_bytes()
    (folder / "03.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "04.jpg").write_bytes(b"")
    # The header and the end are sound, the middle is not: only a decoder notices.
    spoilt = bytearray((folder / "05.jpg").read_bytes())
    spoilt[len(spoilt) // 2 : -2] = b"\xff\xd9" * ((len(spoilt) - 2 - len(spoilt) // 2) // 2)
    (folder / "05.jpg").write_bytes(bytes(spoilt))
    source = open_source("folder", root)
    ours, theirs = both(source, skips=True, batch_size=22, drop_last=False)
    for epoch in (0, 1):
        (a,), (b,) = ours.epoch(epoch), theirs.epoch(epoch)
        assert torch.equal(a.index_N, b.index_N)
        assert [n for n, _ in a.unread] == [n for n, _ in b.unread]
        assert {3, 4} <= {n for n, _ in a.unread}
    with pytest.raises(UserError, match=r"0[345]\.jpg"):
        list(both(source, batch_size=22)[0].epoch(0))


def test_images_in_memory_are_refused():
    pixels = np.zeros((8, 24, 24, 3), np.uint8)
    images = ImageSet("digits/train", pixels, np.zeros(8, np.int64), ("a",))
    with pytest.raises(UserError, match=r"digits/train is in memory: use data\.backend=resident"):
        DaliLoader(images, Loading(**vars(loading())), crop="none", image_size=24)


def test_padding_and_flip_run_on_the_device_as_in_the_resident_loader(root):
    geometry = Geometry(padding=3, pad_mode="reflect", flip=True)
    ours, theirs = both(open_source("folder", root), crop="pad", geometry=geometry)
    for a, b in zip(ours.epoch(5), theirs.epoch(5), strict=True):
        assert levels(a.images_NCHW, b.images_NCHW).mean() < 0.6


def test_a_file_that_dali_refuses_changes_no_other_and_a_resume_goes_on_to_the_byte(
    root, monkeypatch
):
    """DALI's refusal is simulated, for files that both decoders of today's machines read."""
    from fastkd.data.loaders import dali_loader

    source = open_source("folder", root)
    assert isinstance(source, FolderIndex)
    with source.open(5) as stream:
        refused = stream.read()
    usual = list(DaliLoader(source, loading(), **PLACE).epoch(1))
    feed = dali_loader.inputs_of

    def broken(contents, cuts):
        # What a file is to DALI that it cannot decode.
        return feed([b"no image" if one == refused else one for one in contents], cuts)

    monkeypatch.setattr(dali_loader, "inputs_of", broken)
    ours = DaliLoader(source, loading(), **PLACE)
    whole = list(ours.epoch(1))
    for batch, other in zip(whole, usual, strict=True):
        for sample, image, own in zip(
            batch.index_N.tolist(), batch.images_NCHW, other.images_NCHW, strict=True
        ):
            assert torch.equal(image, own) == (sample != 5)
    assert_same(list(ours.epoch(1)), whole)
    assert_same(list(DaliLoader(source, loading(), **PLACE).epoch(1, 2)), whole[2:])


def test_a_fault_of_dali_itself_is_no_bad_image(root, monkeypatch):
    from fastkd.data.loaders import dali_loader
    from fastkd.errors import RunFailed

    calls = iter(range(100))
    outcome = dali_loader.outcome_of

    def fails_once(pipeline, device):
        if next(calls) == 0:
            raise RuntimeError("out of memory")
        return outcome(pipeline, device)

    monkeypatch.setattr(dali_loader, "outcome_of", fails_once)
    ours = DaliLoader(open_source("folder", root), loading(), **PLACE)
    with pytest.raises(RunFailed, match="DALI failed: out of memory"):
        list(ours.epoch(0))
