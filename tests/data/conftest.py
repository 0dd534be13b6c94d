"""Small image folders in exact ImageFolder layout, and a cache folder of its own for each test."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FolderMaker = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("FASTKD_CACHE", str(cache))
    return cache


@pytest.fixture
def make_folder(tmp_path: Path) -> FolderMaker:
    """make_folder(classes=, per_class=, size=(w, h), val="val", suffix=".png") -> root."""

    def make(
        *,
        classes: tuple[str, ...] = ("ant", "bee", "cow"),
        per_class: int = 4,
        size: tuple[int, int] = (12, 12),
        val: str = "val",
        suffix: str = ".png",
        name: str = "set",
    ) -> Path:
        root = tmp_path / name
        random = np.random.default_rng(0)
        for split in ("train", val):
            for class_name in classes:
                folder = root / split / class_name
                folder.mkdir(parents=True)
                for number in range(per_class):
                    pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number:03d}{suffix}")
        return root

    return make
