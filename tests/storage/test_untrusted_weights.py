"""Weight files from strangers: none runs code, and what cannot be read says why."""

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastkd.errors import UserError
from fastkd.models import create_model
from fastkd.storage.weights import load_weights, save_weights


def small() -> nn.Module:
    torch.manual_seed(1)
    return create_model("resnet8", 10, width=0.25)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [4, 5])
def test_a_protocol_that_torch_cannot_read_safely_is_named(
    protocol: int, legacy: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "model.pth"
    content = {"model": small().state_dict(), "opt": argparse.Namespace(lr=0.1)}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        UserError, match=r"written with pickle protocol 4 or 5, .* save it again by torch\.save"
    ):
        load_weights(path)
    assert not recwarn.list


def test_torchs_advice_to_load_unsafely_is_not_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": small().state_dict(), "x": np.array([None], dtype=object)}, path)
    with pytest.raises(UserError, match="ObjectDType") as caught:
        load_weights(path)
    assert "weights_only" not in str(caught.value)


class Payload:
    """Unpickled by Python's own pickle, this creates a file."""

    def __init__(self, path: Path, call: Callable[..., Any]) -> None:
        self.path, self.call = path, call

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self.call is os.system:
            return os.system, (f"touch '{self.path}'",)
        if self.call is exec:
            return exec, (f"open({str(self.path)!r}, 'w')",)
        return open, (str(self.path), "w")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("call", [os.system, exec, open], ids=["os.system", "exec", "open"])
@pytest.mark.parametrize("place", ["beside", "in the namespace", "as a weight", "in an array"])
def test_a_malicious_pickle_is_refused(place: str, call: Any, legacy: bool, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    payload = Payload(proof, call)
    pickle.loads(pickle.dumps(payload))
    assert proof.exists()  # the payload works where nothing stops it
    proof.unlink()
    content = {
        "beside": {"model": small().state_dict(), "extra": payload},
        "in the namespace": {"model": small().state_dict(), "opt": argparse.Namespace(x=payload)},
        "as a weight": {"conv1.weight": payload},
        "in an array": {"model": small().state_dict(), "a": np.array([payload], dtype=object)},
    }[place]
    path = tmp_path / "model.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"model\.pt: .*(refused because|not a PyTorch checkpoint)"):
        load_weights(path)
    assert not proof.exists()


def test_a_whole_pickled_network_is_refused_with_the_cure(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    message = r"Python object \(torch.nn.modules.linear.Linear\).*torch.save\(model.state_dict\(\)"
    with pytest.raises(UserError, match=message):
        load_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped header"])
def test_damaged_files_are_named(name: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_weights(path, small())
    else:
        torch.save(small().state_dict(), path, _use_new_zipfile_serialization=name.endswith("pt"))
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"<html>404 Not Found</html>",
            "cut": whole[: len(whole) // 2],
            "flipped header": bytes(255 - byte for byte in whole[:64]) + whole[64:],
        }[damage]
    )
    said = {"empty": "the file is empty", "text": "a web page, not weights"}
    with pytest.raises(UserError, match=f"{name}: {said.get(damage, 'damaged, or not a')}"):
        load_weights(path)
