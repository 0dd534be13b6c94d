"""Files that people take for weights: each is called what it is, in one sentence."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastkd.errors import UserError
from fastkd.storage.weights import load_into, load_weights

NET = nn.Sequential(nn.Linear(3, 2))


def as_bytes(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def zipped(*names: str) -> bytes:
    def write(buffer: io.BytesIO) -> None:
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")

    return as_bytes(write)


def tarred(buffer: io.BytesIO) -> None:
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"))


def exported(buffer: io.BytesIO) -> None:
    torch.export.save(torch.export.export(NET, (torch.ones(1, 3),)), buffer)


WHOLE = as_bytes(lambda buffer: torch.save(NET.state_dict(), buffer))
KINDS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "TorchScript": (
        "net.pt",
        lambda: as_bytes(
            lambda buffer: torch.jit.save(torch.jit.trace(NET, torch.ones(1, 3)), buffer)
        ),
        r"an exported program \(TorchScript\), not weights; where it was made, save",
    ),
    "torch.export": (
        "net.pt2",
        lambda: as_bytes(exported),
        r"an exported program \(torch.export\), not weights",
    ),
    "numpy archive": (
        "w.npz",
        lambda: as_bytes(lambda buffer: np.savez(buffer, a=np.ones(3))),
        r"an archive of numpy arrays \(.npz\)",
    ),
    "numpy array": (
        "w.npy",
        lambda: as_bytes(lambda buffer: np.save(buffer, np.ones(3))),
        "a numpy array",
    ),
    "tar": ("weights.tar", lambda: as_bytes(tarred), "a tar archive: unpack it"),
    "zip": ("weights.zip", lambda: zipped("model.pth"), "a zip archive: unpack it"),
    "gzip": ("weights.pth.gz", lambda: gzip.compress(WHOLE), "a gzip archive: unpack it"),
    "Keras": ("net.keras", lambda: zipped("config.json", "model.weights.h5"), "a file of Keras"),
    "HDF5": ("net.h5", lambda: b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file"),
    "web page": ("net.pth", lambda: b"\n<!DOCTYPE html><html>", "a web page, not weights"),
    "LFS": (
        "model.safetensors",
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "a pointer of Git LFS, not the file itself: git lfs pull",
    ),
    "empty": ("net.bin", lambda: b"", "the file is empty"),
    "truncated": ("net.pth", lambda: WHOLE[:-200], "damaged, .* its end is missing"),
    "text": ("net.pth", lambda: b"weights", "damaged, or not a PyTorch checkpoint"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_called_what_it_is(kind: str, tmp_path: Path) -> None:
    name, content, sentence = KINDS[kind]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(UserError, match=sentence) as caught:
        load_weights(tmp_path / name)
    assert str(caught.value).count("\n") == 0


def test_a_checkpoint_may_have_any_name(tmp_path: Path) -> None:
    for name in ("model_best.pth.tar", "best.t7", "weights", "net.zip", "net.pt2"):
        (tmp_path / name).write_bytes(WHOLE)
        net = nn.Sequential(nn.Linear(3, 2))
        assert load_into(net, tmp_path / name).complete
        assert torch.equal(net[0].weight, NET[0].weight)


def test_mappings_without_end_are_read(tmp_path: Path) -> None:
    content: dict[str, object] = {"state_dict": NET.state_dict()}
    content["itself"] = content
    torch.save(content, tmp_path / "ring.pth")
    net = nn.Sequential(nn.Linear(3, 2))
    assert load_into(net, tmp_path / "ring.pth").complete
    many: dict[str, object] = {}
    for _ in range(25):
        many = {str(number): many for number in range(10)}
    torch.save({"state_dict": NET.state_dict(), "many": many}, tmp_path / "many.pth")
    assert load_into(net, tmp_path / "many.pth").complete
