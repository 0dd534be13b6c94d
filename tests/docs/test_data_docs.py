"""The command of docs/data.md is one that fastkd takes, with photographs of several sizes."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_the_command(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0)
    for name in ("crow", "jay"):
        (tmp_path / "DIR" / name).mkdir(parents=True)
        for number in range(40):
            pixels = noise.integers(0, 255, (40 + number, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "DIR" / name / f"{number}.png")
    (words,) = re.findall(r"^fastkd (.*)$", PAGE, re.MULTILINE)
    said = command(*shlex.split(words), "--dry-run", "device=cpu", "compile=off")
    assert said.code == 0, said.err
    assert "folder" in said.out and "resnet20" in said.out
