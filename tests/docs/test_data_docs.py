"""The commands of docs/data.md are such that fastkd takes, with photographs of several sizes."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_the_commands(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0)
    for name in ("crow", "jay"):
        (tmp_path / "DIR" / name).mkdir(parents=True)
        for number in range(40):
            pixels = noise.integers(0, 255, (40 + number, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "DIR" / name / f"{number}.png")
    said_there = [
        line.partition("#")[0] for line in re.findall(r"^fastkd (.*)$", PAGE, re.MULTILINE)
    ]
    trained, of_a_set, checked, packed, shrunk, on_shards, benched = said_there
    said = command(*shlex.split(trained), "--dry-run", "device=cpu", "compile=off")
    assert said.code == 0, said.err
    assert "folder" in said.out and "resnet20" in said.out
    said = command(*shlex.split(of_a_set), "--dry-run")
    assert "voc2007 was not found" in said.err  # its lists: tests/data/test_released.py
    said = command(*shlex.split(checked), "data.val_share=0.1")
    assert said.code == 0, said.err
    assert "every file is read" in said.out
    said = command(*shlex.split(benched), "device=cpu", "compile=off", "--seconds=0.1")
    assert said.code == 0, said.err
    assert "The limit is" in said.out
    for words in (packed, shrunk):
        shutil.rmtree(tmp_path / "SHARDS", ignore_errors=True)
        said = command(*shlex.split(words), "data.val_share=0.1")
        assert said.code == 0, said.err
        small = ["data.image_size=32", "batch_size=8", "baseline.lrs="]
        said = command(*shlex.split(on_shards), *small, "--dry-run", "device=cpu", "compile=off")
        assert said.code == 0, said.err
