"""Small sets with label maps in the layouts of `fastkd.data.sources`, for tests."""

from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["write_pairs"]


def write_pairs(
    folder: Path, train: int = 10, val: int = 3, size: tuple[int, int] = (24, 16), classes: int = 3
) -> Path:
    """A folder for data.name=pairs: noise in stripes, each class with a brightness of its own.

    size: width and height in pixels.
    """
    random = np.random.default_rng(0)
    for split, number in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for sample in range(number):
            width, height = size
            stripes_W = (np.arange(width) + sample) * classes // width % classes
            labels_HW = np.broadcast_to(stripes_W, (height, width)).astype(np.uint8)
            noise_HWC = random.integers(0, 60, (height, width, 3))
            image_HWC = (labels_HW[..., None] * (180 // classes) + noise_HWC).astype(np.uint8)
            Image.fromarray(image_HWC).save(folder / "images" / split / f"{sample:03}.png")
            Image.fromarray(labels_HW).save(folder / "labels" / split / f"{sample:03}.png")
    names = [f"class{number}" for number in range(classes)]
    (folder / "classes.txt").write_text("\n".join(names) + "\n")
    return folder
