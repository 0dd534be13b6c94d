"""What docs/transfer.md shows runs as written: its Python, and its commands made small."""

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from fastkd.models import create_model
from fastkd.models.card import card_of, sign
from fastkd.storage.weights import describe, load_weights, save_weights

PAGE = (Path(__file__).parents[2] / "docs" / "transfer.md").read_text()
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^fastkd (.*)$", PAGE, re.MULTILINE)
SMALL = [
    "data.image_size=32",
    "batch_size=4",
    "epochs=1",
    "device=cpu",
    "compile=off",
    "precision=fp32",
    "data.workers=0",
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The tensors of a backbone in RUN/, beside FOLDER/ with images of three classes."""
    monkeypatch.chdir(tmp_path)
    backbone: Any = create_model("torchvision:resnet18", 7)
    sign(backbone, replace(card_of(backbone), normalization=((0.4, 0.4, 0.4), (0.2, 0.2, 0.2))))
    Path("RUN").mkdir()
    save_weights(Path("RUN/best.safetensors"), backbone, describe(backbone))
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("crow", "jay", "rook"):
            folder = Path("FOLDER", split, name)
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return load_weights("RUN")[0]


def test_the_commands(
    run: dict[str, torch.Tensor], command: Callable[..., Any], tmp_path: Path
) -> None:
    linear, finetune, evaluate, tune = (shlex.split(words) for words in COMMANDS)
    for words, out in ((linear, "linear"), (finetune, "finetune")):
        said = command(*words, *SMALL, f"out={out}")
        assert said.code == 0, said.err
        last = torch.load(tmp_path / out / "last.pt", weights_only=True)["student"]
        same = {key for key in run if key[:3] != "fc." and torch.equal(last[key], run[key])}
        assert len(same) == (len(run) - 2 if out == "linear" else 0)
        assert last["fc.weight"].shape == (3, 512)
    given = ["linear" if word == "NEW_RUN" else word for word in evaluate]
    said = command(*given, "data.workers=0")
    assert said.code == 0, said.err
    assert re.search(r"samples +12\n", said.out)
    # A rate at which nothing moves shows where the teacher's training began.
    still = ["teacher.epochs=1", "teacher.lr=1e-9", "teacher.min_accuracy=0", "baseline.lrs="]
    said = command(*tune, *SMALL, *still, "out=tuned")
    assert said.code == 0, said.err
    assert "teacher torchvision:resnet18: 120 of 122 tensors from RUN; new: fc (3 " in said.out
    (lesson,) = (tmp_path / "runs" / "teachers").rglob("best.safetensors")
    began = load_weights(lesson)[0]["layer4.1.conv2.weight"]
    torch.testing.assert_close(began, run["layer4.1.conv2.weight"], atol=1e-4, rtol=0)


def test_several_labels_and_a_detector(run: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(8, 3, 32, 32), (torch.rand(8, 20) < 0.4).float())
    loader = DataLoader(data, batch_size=4)
    names: dict[str, Any] = {"train_loader": loader, "val_loader": loader}
    assert len(CODE) == 2
    for block in CODE:
        exec(compile(block.replace("epochs=10", "epochs=1"), "transfer.md", "exec"), names)
    assert 0 < names["result"].metrics["map_last"] <= 1
    assert names["student"].fc.weight.shape == (20, 512)

    own = names["detector"].backbone.body.state_dict()
    assert len(own) > 80
    assert all(torch.equal(tensor, run[key]) for key, tensor in own.items())
    names["detector"].transform.min_size = (64,)
    (found,) = names["detector"].eval()([torch.rand(3, 64, 64)])
    assert set(found) == {"boxes", "scores", "labels"}
    assert "0.4" in names["facts"]["normalization"]
