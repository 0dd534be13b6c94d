"""Random but learnable images for dry runs: each class is a coarse colour pattern under noise.

No file is read. The label can be recovered from the pixels (nearest class pattern), so a loss that
does not fall is the code's fault, not the data's.
"""

import numpy as np

from fastkd.data.sources.image_set import ImageSet
from fastkd.errors import UserError

__all__ = ["NUM_CLASSES", "NUM_IMAGES", "make_synthetic"]

NUM_CLASSES = 10
NUM_IMAGES = {"train": 2000, "val": 500}
_GRID = 4


def make_synthetic(split: str, image_size: int = 32) -> ImageSet:
    """uint8 [2000 or 500, S, S, 3]; the same bytes in every process, classes equally frequent."""
    if image_size < _GRID:
        raise UserError(f"data.image_size={image_size} is too small, synthetic needs {_GRID}")
    words = np.random.Philox(1).random_raw(NUM_CLASSES * _GRID * _GRID * 3)
    pattern_CGG3 = (words >> np.uint64(63)).astype(np.uint8).reshape(NUM_CLASSES, _GRID, _GRID, 3)
    cell = np.arange(image_size) * _GRID // image_size
    pattern_CHW3 = 64 + 96 * pattern_CGG3[:, cell][:, :, cell]

    count = NUM_IMAGES[split]
    labels_N = np.arange(count, dtype=np.int64) % NUM_CLASSES
    shape = (count, image_size, image_size, 3)
    generator = np.random.Philox(2 if split == "train" else 3)
    num_bytes = int(np.prod(shape))
    noise = generator.random_raw((num_bytes + 7) // 8).view(np.uint8)[:num_bytes].reshape(shape)
    # pattern 64 or 160, noise -48..47: the two levels of a cell stay apart
    images_NHWC = pattern_CHW3[labels_N] + noise % np.uint8(96) - np.uint8(48)
    return ImageSet(
        f"synthetic/{split}",
        images_NHWC.astype(np.uint8),
        labels_N,
        tuple(f"class{label}" for label in range(NUM_CLASSES)),
    )
