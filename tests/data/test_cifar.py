"""CIFAR archives generated in their exact layouts, damaged ones, and pickles with an agenda."""

import multiprocessing
import os
import pickle
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data import FolderIndex, open_data, open_source, open_split
from fastkd.data.config import AppearanceConfig, DataConfig
from fastkd.data.sources.cifar import LAYOUTS
from fastkd.errors import UserError

PER_FILE = 6


def pixels_and_labels(part: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(part)
    pixels = random.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8)
    return pixels, random.integers(0, classes, PER_FILE)


def python2_pickle(content: dict[str, object]) -> bytes:
    """Protocol 2 as Python 2's cPickle wrote the originals: keys and raw pixels are `str`."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def dump(value: object) -> bytes:
        if isinstance(value, str):
            return text(value.encode())
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(dump(item) for item in value) + b"e"
        assert isinstance(value, np.ndarray) and value.dtype == np.uint8
        shape = b"".join(dump(size) for size in value.shape)
        dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNN"
        dtype += dump(-1) + dump(-1) + b"K\x00tb"
        raw = value.tobytes()
        start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b")
        state = b"(K\x01(" + shape + b"t" + dtype + b"\x89T" + struct.pack("<i", len(raw)) + raw
        return start + b"tR" + state + b"tb"

    items = b"".join(dump(key) + dump(value) for key, value in content.items())
    return b"\x80\x02}(" + items + b"u."


def python3_pickle(content: dict[str, object]) -> bytes:
    return pickle.dumps({key.encode(): value for key, value in content.items()}, protocol=2)


def class_names(name: str) -> list[str]:
    return [f"kind{label:02d}" for label in range(LAYOUTS[name].classes)]


def write_archive(name: str, root: Path, kind: str) -> Path:
    """A small archive; returns the folder that holds the files."""
    layout = LAYOUTS[name]
    folder = root / (layout.binary_dir if kind == "binary" else layout.python_dir)
    folder.mkdir(parents=True)
    for part, (file, binary_file) in enumerate(
        zip(layout.train + layout.val, layout.binary_train + layout.binary_val, strict=True)
    ):
        pixels, labels = pixels_and_labels(part, layout.classes)
        if kind == "binary":
            columns = [labels[:, None].astype(np.uint8), pixels]
            if name == "cifar100":
                columns.insert(0, np.full((PER_FILE, 1), 99, dtype=np.uint8))
            (folder / binary_file).write_bytes(np.hstack(columns).tobytes())
        else:
            write = python2_pickle if kind == "python2" else python3_pickle
            content = {"data": pixels, layout.label_key: labels.tolist()}
            (folder / file).write_bytes(write(content))
    if kind == "binary":
        (folder / layout.binary_meta).write_text("\n".join(class_names(name)) + "\n")
    else:
        write = python2_pickle if kind == "python2" else python3_pickle
        (folder / layout.meta).write_bytes(write({layout.names_key: class_names(name)}))
    return folder


@pytest.mark.parametrize("place", ["above", "inside", "below-name"])
@pytest.mark.parametrize("kind", ["python2", "python3", "binary"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_original_layouts(tmp_path, name, kind, place):
    below = tmp_path / name if place == "below-name" else tmp_path
    folder = write_archive(name, below, kind)
    root = folder if place == "inside" else tmp_path
    layout = LAYOUTS[name]
    parts = [
        pixels_and_labels(part, layout.classes)
        for part in range(len(layout.train) + len(layout.val))
    ]
    for split, chosen in (("train", parts[:-1]), ("val", parts[-1:])):
        images = open_split(name, root, split)
        assert images.classes == tuple(class_names(name))
        np.testing.assert_array_equal(images.labels_N, np.concatenate([y for _, y in chosen]))
        planes = np.concatenate([x for x, _ in chosen])
        # red, green, blue planes of 1,024 bytes each, row by row
        for channel in range(3):
            np.testing.assert_array_equal(
                images.images_NHWC[..., channel].reshape(len(planes), 1024),
                planes[:, 1024 * channel : 1024 * (channel + 1)],
            )


@pytest.mark.parametrize("layout", ["binary", "folder"])
@pytest.mark.parametrize("size", [48, 20])
def test_cifar_in_another_size_is_resized_by_every_loader(tmp_path, make_folder, layout, size):
    """Against torch's antialiased bilinear; Pillow's rounds between its two passes."""
    if layout == "folder":
        make_folder(classes=tuple(class_names("cifar10")), size=(32, 32))
    else:
        write_archive("cifar10", tmp_path / "set", layout)
    root = tmp_path / "set"
    plain = torch.from_numpy(open_split("cifar10", root).images_NHWC).permute(0, 3, 1, 2).double()
    expected = F.interpolate(plain, size, mode="bilinear", antialias=True)
    world = World(0, 0, 1, torch.device("cpu"), None)
    found = []
    for backend in ("resident", "torch"):
        pair = open_data(
            DataConfig(
                name="cifar10",
                root=str(root),
                image_size=size,
                backend=backend,
                workers=0,
                mean=(0.0, 0.0, 0.0),
                std=(1.0, 1.0, 1.0),
                drop_last=False,
            ),
            AppearanceConfig(crop="none", flip=False),
            batch_size=len(plain),
            seed=0,
            placement=Placement(world, Precision("fp32", "cpu")),
        )
        assert (pair.facts.image_shape, pair.backend) == ((3, size, size), backend)
        batch = next(pair.train.epoch(0))
        found.append(batch.images_NCHW[batch.index_N.argsort()])
    assert torch.equal(*found)
    assert (found[0].double() * 255 - expected).abs().max() <= 1.01


def test_names_fall_back_to_numbers_without_a_meta_file(tmp_path):
    folder = write_archive("cifar10", tmp_path, "binary")
    (folder / "batches.meta.txt").unlink()
    assert open_split("cifar10", tmp_path).classes == tuple("0123456789")


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {self.target}",)

    def __init__(self, target: Path):
        self.target = target


def test_a_pickle_that_runs_a_program_is_refused_before_it_runs(tmp_path):
    folder = write_archive("cifar10", tmp_path, "python3")
    target = tmp_path / "owned"
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": Evil(target)}, protocol=2))
    with pytest.raises(UserError, match=r"data_batch_2: refused: it asks for (posix|nt)\.system"):
        open_split("cifar10", tmp_path)
    assert not target.exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"cbuiltins\neval\n(U\x011tR.",
        b"cnumpy\nfromfile\n(U\x01xtR.",
        b"cnumpy.core.multiarray\nfromfile\n(U\x01xtR.",
        b"c_codecs\nlookup\n(U\x01xtR.",
        b"cfunctools\npartial\n(U\x01xtR.",
        b"cnumpy\nndarray.__reduce__\n(tR.",
    ],
    ids=["eval", "numpy-fromfile", "multiarray-fromfile", "codecs", "partial", "dotted"],
)
def test_only_array_building_names_are_admitted(tmp_path, payload):
    folder = write_archive("cifar100", tmp_path, "python3")
    (folder / "train").write_bytes(b"\x80\x04" + payload)
    with pytest.raises(UserError, match="refused: it asks for "):
        open_split("cifar100", tmp_path)


def test_codecs_may_only_encode_latin1(tmp_path):
    folder = write_archive("cifar100", tmp_path, "python3")
    payload = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x05\x00\x00\x00rot13\x86R."
    (folder / "train").write_bytes(payload)
    with pytest.raises(UserError, match="refused: text in the encoding 'rot13'"):
        open_split("cifar100", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"\x80\x02}(U\x04dataU", "cannot be read"),
        (pickle.dumps([1, 2]), "holds a list, expected a dictionary"),
        (pickle.dumps({b"data": b"abc", b"labels": [1]}, protocol=2), "holds no 'data' array"),
        (
            pickle.dumps({b"data": np.zeros((2, 9), np.uint8), b"labels": [1, 2]}, protocol=2),
            r"is damaged: data is uint8 \(2, 9\), expected uint8 \(2, 3072\)",
        ),
        (
            pickle.dumps({b"data": np.zeros((1, 3072), "O"), b"labels": [1]}, protocol=2),
            "is damaged: data is object",
        ),
    ],
    ids=["empty", "truncated", "list", "no-array", "shape", "objects"],
)
def test_damaged_python_batch_is_named(tmp_path, content, message):
    folder = write_archive("cifar10", tmp_path, "python3")
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(UserError, match=f"test_batch.* {message}"):
        open_split("cifar10", tmp_path, "val")
    assert len(open_split("cifar10", tmp_path, "train")) == 5 * PER_FILE


def test_truncated_binary_file_is_named(tmp_path):
    folder = write_archive("cifar10", tmp_path, "binary")
    file = folder / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"data_batch_3\.bin is damaged: 18437 bytes .* of 3073"):
        open_split("cifar10", tmp_path)


def test_missing_batch_is_named(tmp_path):
    folder = write_archive("cifar10", tmp_path, "python3")
    (folder / "data_batch_4").unlink()
    with pytest.raises(UserError, match="cifar10: data_batch_4 missing in "):
        open_split("cifar10", tmp_path)


def test_label_out_of_range_is_refused(tmp_path):
    folder = write_archive("cifar10", tmp_path, "binary")
    (folder / "test_batch.bin").write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(UserError, match="labels run from 10 to 10, but there are 10 classes"):
        open_split("cifar10", tmp_path, "val")


@pytest.mark.parametrize("place", ["set", "set/cifar10"])
def test_image_folder_layout(tmp_path, make_folder, place):
    names = tuple(class_names("cifar10"))
    root = make_folder(classes=names, per_class=2, size=(32, 32), val="test", name=place)
    source = open_source("cifar10", tmp_path / "set", "val")
    assert isinstance(source, FolderIndex)
    images = open_split("cifar10", tmp_path / "set", "val")
    assert images.name == "cifar10/val" and images.classes == names
    assert images.images_NHWC.shape == (20, 32, 32, 3)
    expected = np.asarray(Image.open(root / "test" / "kind03" / "001.png"))
    np.testing.assert_array_equal(images.images_NHWC[7], expected)


def test_image_folder_of_another_data_set_is_refused(make_folder):
    root = make_folder(size=(32, 32))
    with pytest.raises(UserError, match=r"holds 3 classes, cifar10 has 10; use data.name=folder"):
        open_split("cifar10", root)


def test_not_found_says_what_was_looked_for(tmp_path):
    with pytest.raises(UserError) as caught:
        open_split("cifar10", tmp_path)
    message = str(caught.value)
    for part in (str(tmp_path), "cifar-10-batches-py/", "cifar-10-batches-bin/", "data.download"):
        assert part in message


def test_download_happens_only_when_asked_for_and_needed(tmp_path, monkeypatch):
    calls = []

    def fake(url, root, extract_root, filename, md5):
        calls.append((url, md5))
        write_archive("cifar100", Path(extract_root), "python2")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fake)
    with pytest.raises(UserError, match="was not found"):
        open_split("cifar100", tmp_path)
    assert calls == []
    assert len(open_split("cifar100", tmp_path, download=True)) == PER_FILE
    assert len(open_split("cifar100", tmp_path, download=True)) == PER_FILE
    assert [md5 for _, md5 in calls] == ["eb9058c3a382ffc7106e4002c42a8d85"]


def test_processes_that_start_together_download_once_and_read_whole_files(tmp_path, monkeypatch):
    calls = tmp_path / "calls"

    def slow(_url, root, extract_root, filename, md5):
        with open(calls, "a") as stream:
            stream.write("called\n")
        write_archive("cifar10", Path(extract_root), "python3")
        time.sleep(0.5)

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", slow)

    def read(number):
        time.sleep(0.15 * number)
        os._exit(len(open_split("cifar10", tmp_path / "set", download=True)) != 5 * PER_FILE)

    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=read, args=(number,)) for number in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert calls.read_text() == "called\n"
    assert [entry.name for entry in (tmp_path / "set").iterdir() if entry.is_dir()] == [
        "cifar-10-batches-py"
    ]


def test_failed_download_is_a_user_error(tmp_path, monkeypatch):
    def fake(*_args, **_kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fake)
    with pytest.raises(UserError, match=r"could not be downloaded .* network is unreachable"):
        open_split("cifar10", tmp_path, download=True)


DATA = os.environ.get("FASTKD_TEST_DATA")


@pytest.mark.skipif(not DATA, reason="FASTKD_TEST_DATA is not set (folder with cifar10/ in it)")
def test_real_cifar10(tmp_path):
    val = open_split("cifar10", f"{DATA}/cifar10", "val")
    assert val.images_NHWC.shape == (10_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(val.labels_N), [1000] * 10)
    assert val.classes[0] == "airplane" and val.classes[9] == "truck"
    # mean and deviation of CIFAR-10's pixels are known to three digits; JPEG moves them little
    pixels = val.images_NHWC / 255
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), (0.494, 0.485, 0.450), atol=0.005)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), (0.247, 0.243, 0.262), atol=0.01)
    train = open_split("cifar10", f"{DATA}/cifar10", "train", limit=1000)
    np.testing.assert_array_equal(np.bincount(train.labels_N), [100] * 10)
    again = open_split("cifar10", f"{DATA}/cifar10", "val")
    np.testing.assert_array_equal(again.images_NHWC, val.images_NHWC)
