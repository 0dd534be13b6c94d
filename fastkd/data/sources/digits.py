"""Handwritten digits that ship inside scikit-learn: the quickstart's data, no download.

1,797 images of 8x8 with 17 grey levels (UCI "Optical Recognition of Handwritten Digits", test
part), enlarged to 16x16 and repeated over three channels. 30 images of each digit are the training
split, the other 1,497 the validation split; both are the same on every machine and never change.
"""

import numpy as np

from fastkd.data.sources.image_set import ImageSet
from fastkd.errors import UserError

__all__ = ["IMAGE_SIZE", "TRAIN_PER_CLASS", "load_digits"]

IMAGE_SIZE = 16
TRAIN_PER_CLASS = 30
# The file is ordered by writer, so taking the first 30 of each digit would train on few hands.
SPLIT_SEED = 20210


def load_digits(split: str) -> ImageSet:
    """The "train" (300) or "val" (1,497) images, uint8 [N, 16, 16, 3].

    Training images come as 0, 1, ..., 9, 0, 1, ...: every prefix is stratified.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise UserError(
            "data.name=digits needs scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    levels_N64, targets_N = sklearn_digits(return_X_y=True)
    images_N88 = np.asarray(levels_N64, dtype=np.int64).reshape(-1, 8, 8)
    labels_N = np.asarray(targets_N, dtype=np.int64)

    shuffled = np.argsort(np.random.Philox(SPLIT_SEED).random_raw(len(labels_N)), kind="stable")
    train_KC = np.stack(
        [shuffled[labels_N[shuffled] == digit][:TRAIN_PER_CLASS] for digit in range(10)], axis=1
    )
    train = train_KC.reshape(-1)
    chosen = train if split == "train" else np.setdiff1d(np.arange(len(labels_N)), train)
    images_NHWC = np.repeat(_enlarge(images_N88[chosen])[..., None], 3, axis=3)
    return ImageSet(
        f"digits/{split}", images_NHWC, labels_N[chosen], tuple(str(digit) for digit in range(10))
    )


def _enlarge(levels_N88: np.ndarray) -> np.ndarray:
    """8x8 levels 0..16 -> 16x16 uint8, bilinear with half-pixel centres, in integers.

    A new pixel is 3/4 of the old pixel that contains it and 1/4 of the nearest neighbour, along
    each axis (edges repeat), so 16 * 16 is full white: no rounding depends on the machine.
    """
    scaled = levels_N88
    for axis in (1, 2):
        before = np.take(scaled, [0, 0, 1, 2, 3, 4, 5, 6], axis)
        after = np.take(scaled, [1, 2, 3, 4, 5, 6, 7, 7], axis)
        pairs = np.stack([3 * scaled + before, 3 * scaled + after], axis=axis + 1)
        scaled = pairs.reshape(*scaled.shape[:axis], 16, *scaled.shape[axis + 1 :])
    return ((scaled * 255 + 128) // 256).astype(np.uint8)
