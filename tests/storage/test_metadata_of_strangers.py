"""Metadata of a stranger's safetensors: refused in a sentence, before anything large or foreign.

Each file holds a small network; only what it says of itself is absurd. Nothing is downloaded, no
other file is opened, no memory is taken.
"""

import builtins
import json
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastkd
from fastkd.errors import UserError
from fastkd.models import create_model, model_from_file
from fastkd.models.reused_head import Projector, ReusedHead
from fastkd.storage.weights import load_weights, save_weights

DIGITS = "9" * 5000
MOST_MIB = 200
"""By how much the process may grow: no network here comes near it."""


def options(**given: Any) -> dict[str, str]:
    return {"options": json.dumps(given)}


FIELDS: dict[str, dict[str, str]] = {
    "classes: digits": {"num_classes": DIGITS},
    "classes: none": {"num_classes": "0"},
    "classes: negative": {"num_classes": "-10"},
    "classes: a fraction": {"num_classes": "10.5"},
    "classes: text": {"num_classes": "ten"},
    "classes: other digits": {"num_classes": "²"},
    "classes: large": {"num_classes": "99999999"},
    "name: unknown": {"architecture": "resnet9000"},
    "name: empty": {"architecture": ""},
    "name: long": {"architecture": "resnet8" * 1000},
    "name: deep": {"architecture": "wrn_9994_999"},
    "name: wide": {"architecture": "wrn_10_999"},
    "name: huge": {"architecture": "timm:vit_giant_patch14_224"},
    "name: huge regnet": {"architecture": "torchvision:regnet_y_128gf"},
    "name: a repository": {"architecture": "timm:hf-hub:timm/resnet18.a1_in1k"},
    "name: a folder": {"architecture": "timm:local-dir:/elsewhere/net"},
    "name: a path": {"architecture": "../../etc/passwd"},
    "name: simkd alone": {"architecture": "simkd:resnet8"},
    "name: simkd twice": {"architecture": "simkd:simkd:resnet8"},
    "name: control characters": {"architecture": "\x1b[31mresnet8\n"},
    "options: no JSON": {"options": "{width"},
    "options: a list": {"options": "[1]"},
    "options: nested": {"options": "[" * 5000},
    "options: digits": {"options": '{"width": ' + DIGITS + "}"},
    "options: NaN": {"options": '{"width": NaN}'},
    "options: infinite": {"options": '{"width": 1e999}'},
    "options: unknown": options(depth=8),
    "width: text": options(width="wide"),
    "width: negative": options(width=-1),
    "width: zero": options(width=0),
    "width: a list": options(width=[1, 2]),
    "width: large": options(width=60000),
    "block: unknown": options(block="X(4)"),
    "block: a number": options(block=4),
    "block: digits": options(block=f"G({DIGITS})"),
    "shortcuts: unknown": options(shortcuts="all"),
    "an argument": options(num_classes=7),
    "pretrained": options(pretrained=True),
    "new_head": options(new_head=True),
    "weights": options(weights="/etc/passwd"),
    "normalization: zero": {"normalization": "[[0.5, 0.5, 0.5], [0, 0.2, 0.2]]"},
    "normalization: negative": {"normalization": "[[0.5, 0.5, 0.5], [-1, 0.2, 0.2]]"},
    "normalization: NaN": {"normalization": "[[NaN, 0.5, 0.5], [0.2, 0.2, 0.2]]"},
    "normalization: infinite": {"normalization": "[[0.5, 0.5, 0.5], [1e999, 0.2, 0.2]]"},
    "normalization: tiny": {"normalization": "[[0.5, 0.5, 0.5], [1e-300, 0.2, 0.2]]"},
    "normalization: short": {"normalization": "[[0.5], [0.2]]"},
    "normalization: text": {"normalization": '"imagenet"'},
    "normalization: of text": {"normalization": '[["a", "b", "c"], [1, 1, 1]]'},
    "normalization: digits": {"normalization": f"[[{DIGITS}, 0, 0], [1, 1, 1]]"},
}
TIMM: dict[str, dict[str, str]] = {
    "a file": options(checkpoint_path="/etc/passwd"),
    "pretrained": options(pretrained=True),
    "a url": options(pretrained_cfg={"url": "http://localhost/x.pth"}),
    "an overlay": options(pretrained_cfg_overlay={"file": "/etc/passwd"}),
    "a cache": options(cache_dir="/elsewhere"),
    "layers": options(layers=[60000, 1, 1, 1]),
    "channels": options(channels=[60000, 60000, 60000, 60000]),
    "a negative": options(in_chans=-3),
    "many channels": options(in_chans=65000),
    "other layers": options(block="evil"),
    "features": options(features_only=True),
    "beyond": options(in_chans=2**40),
}


@pytest.fixture
def _nothing_foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No connection, no file of /etc or /elsewhere/net, little memory."""

    def refuse(*args: Any, **keys: Any) -> Any:
        raise AssertionError("a connection")

    real_open = builtins.open

    def opening(file: Any, *args: Any, **keys: Any) -> Any:
        assert not str(file).startswith(("/etc/passwd", "/elsewhere/net")), file
        return real_open(file, *args, **keys)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(builtins, "open", opening)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MIB * 1024


def assert_refused(path: Path, **given: Any) -> None:
    begun = time.monotonic()
    for build in (
        lambda: model_from_file(path),
        lambda: create_model("resnet8", weights=path, **given),
    ):
        with pytest.raises(UserError) as caught:
            build()
        said = str(caught.value)
        assert path.name in said
        assert len(said) < 700 and "\n" not in said and "\x1b" not in said
        assert "set_int_max_str_digits" not in said
    assert time.monotonic() - begun < 20


@pytest.mark.usefixtures("_nothing_foreign")
@pytest.mark.parametrize("field", FIELDS)
def test_every_field(field: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    save_weights(path, create_model("resnet8", 10, width=0.25), FIELDS[field])
    if "architecture" not in FIELDS[field] and field.startswith(("normalization", "options: no")):
        with pytest.raises(UserError, match="its metadata cannot be read"):
            create_model("resnet8", 10, width=0.25, weights=path)
    assert_refused(path, num_classes=None if "classes" in field else 7)
    # The tensors may still be looked at.
    assert load_weights(path)[0]


@pytest.mark.usefixtures("_nothing_foreign")
@pytest.mark.parametrize("field", TIMM)
def test_options_of_timm(field: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    model = create_model("timm:test_resnet", 10)
    save_weights(path, model, TIMM[field])
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"theirs\.safetensors") as caught:
        model_from_file(path)
    assert len(str(caught.value)) < 1200
    assert time.monotonic() - begun < 20


@pytest.mark.usefixtures("_nothing_foreign")
@pytest.mark.parametrize(
    "change",
    [
        {"tap": "../x"},
        {"tap": 3},
        {"tap": "stage9"},
        {"size": [0, 0]},
        {"size": []},
        {"size": 4},
        {"factor": 0},
        {"teacher_channels": 60000},
        {"student_channels": -1},
        {"student": {"width": 1000}},
        {"student": {"weights": "/etc/passwd"}},
        {"student": 3},
        {"more": 1},
    ],
    ids=str,
)
def test_options_of_simkd(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    body = create_model("resnet8", 10, width=0.25)
    model = ReusedHead(body, Projector(16, 32, 2), nn.Linear(32, 10), tap="stage3", size=(4, 4))
    save_weights(path, model)
    assert isinstance(model_from_file(path), ReusedHead)
    written = json.loads(load_weights(path)[1]["options"])
    save_weights(path, model, {"options": json.dumps(written | change)})
    with pytest.raises(UserError, match=r"theirs\.safetensors"):
        model_from_file(path)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("resnet8", {"width": 0.5, "block": "G(4)"}),
        ("wrn_16_2", {"block": "BG(2,M/8)", "shortcuts": False, "dropout": 0.3}),
        ("resnet18", {"stem": "imagenet-nopool", "width": 0.25, "shortcuts": "projection"}),
        ("timm:test_resnet", {"drop_rate": 0.1, "in_chans": 3}),
        ("timm:test_vit", {"img_size": 64, "global_pool": "avg"}),
        ("torchvision:regnet_y_400mf", {}),
        ("torchvision:mobilenet_v3_small", {"width_mult": 0.5}),
    ],
)
def test_what_fastkd_writes_is_read(name: str, given: dict[str, Any], tmp_path: Path) -> None:
    model = create_model(name, 7, **given)
    save_weights(tmp_path / "ours.safetensors", model)
    again = model_from_file(tmp_path / "ours.safetensors")
    side = 64
    images_NCHW = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(again.eval()(images_NCHW), model.eval()(images_NCHW))
    # Options that are not given come from the file.
    named = fastkd.create_model(name, weights=tmp_path / "ours.safetensors")
    with torch.no_grad():
        assert torch.equal(named.eval()(images_NCHW), model(images_NCHW))
