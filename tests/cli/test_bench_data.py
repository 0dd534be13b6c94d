"""`fastkd bench data`: three rates that fit each other, and the advice that follows from them."""

import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastkd.data.sources.folder import FolderIndex

WORDS = [
    "quickstart",
    "teacher.name=resnet8",
    "student.name=resnet8",
    "student.width=null",
    "baseline.lrs=",
    "batch_size=8",
    "compile=off",
    "device=cpu",
    "precision=fp32",
]


def rates(text: str) -> dict[str, float]:
    found = re.findall(r"(loader alone|step alone|both) +([\d,]+) images/s", text)
    return {name: float(number.replace(",", "")) for name, number in found}


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for n in range(8):
                pixels = np.full((300, 400, 3), 20 * n, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / split / name / f"{n}.jpg")
    return tmp_path / "set"


def test_a_fast_loader_leaves_the_step_as_the_limit(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command("bench", "data", *WORDS, "--seconds", "0.2")
    assert said.code == 0, said.err
    assert "data.backend=resident" in said.out
    found = rates(said.out)
    # Digits are in memory: the loader is many times as fast as a network.
    assert found["loader alone"] > 2 * found["step alone"] > 0
    assert found["both"] < 1.5 * found["step alone"]
    assert "The limit is the step" in said.out
    assert not list(tmp_path.iterdir())


def test_a_slow_loader_is_the_limit_and_the_advice_fits(
    command, tmp_path, monkeypatch, photographs
):
    monkeypatch.chdir(tmp_path)
    image = FolderIndex.image

    def slow(self: FolderIndex, sample: int) -> Image.Image:
        time.sleep(0.02)
        return image(self, sample)

    monkeypatch.setattr(FolderIndex, "image", slow)
    words = ["data.name=folder", f"data.root={photographs}", "data.image_size=32", "data.workers=0"]
    words += ["augment.crop=resized", "augment.padding=0"]
    said = command("bench", "data", *WORDS, *words, "--seconds", "0.3")
    assert said.code == 0, said.err
    found = rates(said.out)
    assert found["loader alone"] < 50 and found["both"] < found["step alone"]
    assert "The limit is the loader" in said.out
    assert "would use all cores (now 0)" in said.out
    assert "data.backend=dali" in said.out
    assert "have 300 pixels on their short side, and 37 are enough" in said.out
    assert "--shrink 37" in said.out


def test_seconds_are_checked(command):
    said = command("bench", "data", "quickstart", "--seconds", "0")
    assert said.code == 2 and "expected more than 0" in said.err
