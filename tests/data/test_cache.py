"""The cache of decoded folders: built once, verified, rebuilt when anything does not match."""

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastkd.data import open_source, open_split
from fastkd.data.sources.cache import decoded_images
from fastkd.errors import UserError
from fastkd.storage.cache_folder import cache_folder


class Builds:
    """Counts how often a folder was decoded, by the progress it reported."""

    def __init__(self):
        self.reports = []

    def __call__(self, done, total):
        self.reports.append((done, total))


def open_counted(root: Path) -> tuple[np.ndarray, int]:
    builds = Builds()
    images = open_split("folder", root, progress=builds).images_NHWC
    return images, len(builds.reports)


def cache_file(cache: Path, suffix: str) -> Path:
    (file,) = cache.glob(f"folder-train-*{suffix}")
    return file


def test_second_opening_reads_what_the_first_has_built(make_folder):
    root = make_folder()
    first, built = open_counted(root)
    second, built_again = open_counted(root)
    assert (built, built_again) == (1, 0)
    assert isinstance(second, np.memmap) and second.mode == "c"
    np.testing.assert_array_equal(first, second)


def test_progress_counts_to_the_end(make_folder):
    root = make_folder(classes=("a", "b"), per_class=600, size=(2, 2))
    builds = Builds()
    open_split("folder", root, progress=builds)
    assert builds.reports == [(1024, 1200), (1200, 1200)]


def test_writing_into_the_images_does_not_reach_the_file(make_folder):
    root = make_folder()
    images, _ = open_counted(root)
    original = images.copy()
    images[:] = 7
    again, built = open_counted(root)
    assert built == 0
    np.testing.assert_array_equal(again, original)


@pytest.mark.parametrize("damage", ["truncate", "flip-a-bit", "no-json", "bad-json", "json-list"])
def test_damaged_cache_is_rebuilt(make_folder, own_cache, damage):
    root = make_folder()
    original = open_counted(root)[0].copy()
    pixels, record = cache_file(own_cache, ".npy"), cache_file(own_cache, ".json")
    if damage == "truncate":
        pixels.write_bytes(pixels.read_bytes()[:-100])
    elif damage == "flip-a-bit":
        content = bytearray(pixels.read_bytes())
        content[-50] ^= 1
        pixels.write_bytes(content)
    elif damage == "no-json":
        record.unlink()
    else:
        record.write_text("{" if damage == "bad-json" else "[]")
    images, built = open_counted(root)
    assert built == 1
    np.testing.assert_array_equal(images, original)
    assert open_counted(root)[1] == 0


def test_changed_image_is_noticed(make_folder):
    root = make_folder()
    open_counted(root)
    Image.new("RGB", (12, 12), (9, 9, 9)).save(root / "train" / "ant" / "001.png")
    images, built = open_counted(root)
    assert built == 1
    assert (images[1] == 9).all()


def test_touched_added_and_renamed_files_are_noticed(make_folder):
    root = make_folder()
    folder = root / "train" / "bee"
    listings = {open_source("folder", root).listing}
    os.utime(folder / "000.png", ns=(1, 1))
    listings.add(open_source("folder", root).listing)
    (folder / "000.png").rename(folder / "zzz.png")
    listings.add(open_source("folder", root).listing)
    Image.new("RGB", (12, 12)).save(folder / "new.png")
    listings.add(open_source("folder", root).listing)
    assert len(listings) == 4


def test_sizes_and_subsets_have_caches_of_their_own(make_folder, own_cache):
    root = make_folder()
    for arguments in ({}, {"image_size": 8}, {"limit": 6}):
        open_split("folder", root, **arguments)
    assert len(list(own_cache.glob("*.npy"))) == 3
    assert open_counted(root)[1] == 0


def test_the_record_says_where_the_pixels_come_from(make_folder, own_cache):
    root = make_folder()
    open_counted(root)
    record = json.loads(cache_file(own_cache, ".json").read_text())
    assert record["source"] == os.path.realpath(root / "train")
    assert record["shape"] == [12, 12, 12, 3]


def _open_in_child(root: Path, started: Path) -> None:
    def report(done: int, total: int) -> None:
        # slow enough for the others to arrive at the lock
        (started / f"built-by-{os.getpid()}").touch()
        time.sleep(0.5)

    images = open_split("folder", root, progress=report).images_NHWC
    (started / f"sum-{os.getpid()}").write_text(str(int(images.sum())))


def test_one_process_builds_and_the_others_wait(make_folder, tmp_path):
    root = make_folder()
    notes = tmp_path / "notes"
    notes.mkdir()
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_open_in_child, args=(root, notes)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert len(list(notes.glob("built-by-*"))) == 1
    sums = {file.read_text() for file in notes.glob("sum-*")}
    assert sums == {str(int(open_split("folder", root).images_NHWC.sum()))}


def _die_while_building(root: Path) -> None:
    open_split("folder", root, progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def test_killed_builder_leaves_nothing_that_is_believed(make_folder, own_cache):
    root = make_folder()
    child = multiprocessing.get_context("fork").Process(target=_die_while_building, args=(root,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert not list(own_cache.glob("folder-*.npy"))
    assert list(own_cache.glob(".*.npy")), "the child should have died with a half-written file"
    _, built = open_counted(root)
    assert built == 1
    assert not list(own_cache.glob(".*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["disk-full", "quota"])
def test_no_space_left_is_a_user_error(make_folder, own_cache, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    root = make_folder()
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(UserError, match=f"no space left in {own_cache} .* FASTKD_CACHE"):
        open_split("folder", root)
    assert [file.suffix for file in own_cache.iterdir()] == [".lock"]


def test_cache_folder_that_cannot_be_made_is_a_user_error(make_folder, tmp_path):
    (tmp_path / "file").write_text("")
    index = open_source("folder", make_folder())
    with pytest.raises(UserError, match=r"cache folder .* cannot be used: .* FASTKD_CACHE"):
        decoded_images(index, None, tmp_path / "file" / "cache")


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTKD_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_folder("/zero") == Path("/zero")
    assert cache_folder() == Path("/one")
    monkeypatch.delenv("FASTKD_CACHE")
    assert cache_folder() == Path("/two/fastkd")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fastkd"
