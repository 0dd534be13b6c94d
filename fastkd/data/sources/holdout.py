"""Validation images drawn from the training images: for a folder that has no validation split, and
for choices that must not read it (data.tune_share).

Within each class the images are ordered by a hash of seed and file name, and the first ones are
held back. So the split is the same on every rank, at every resume and on every machine, and an
image that is added later moves no other one, but at the border. It depends on a seed of its own:
a teacher or a run of a sweep with another `seed` must not have trained on these images.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Holdout"]


@dataclass(frozen=True)
class Holdout:
    """Which share of every class is held back for validation; keys in `DataConfig`."""

    share: float
    seed: int = 0

    def positions(self, files: Sequence[bytes], labels_N: np.ndarray, split: str) -> np.ndarray:
        """Ascending positions of the "train" or the "val" images, int64.

        Every class has an image in both, if it has two or more; one of a single image has none
        in "val".
        """
        key = str(self.seed).encode()
        hashes = [hashlib.blake2b(file, digest_size=8, key=key).digest() for file in files]
        hashes_N = np.frombuffer(b"".join(hashes), dtype=">u8")
        order = np.lexsort((hashes_N, labels_N))
        sorted_labels = labels_N[order]
        first_of_class = np.searchsorted(sorted_labels, sorted_labels)
        nth_of_class = np.arange(len(order)) - first_of_class
        wanted = [self.count(images) for images in np.bincount(labels_N).tolist()]
        held = nth_of_class < np.array(wanted)[sorted_labels]
        return np.sort(order[held if split == "val" else ~held])

    def count(self, images: int) -> int:
        """How many of a class's images are held back: the nearest number, at least 1, not all."""
        return min(max(1, int(self.share * images + 0.5)), images - 1)
