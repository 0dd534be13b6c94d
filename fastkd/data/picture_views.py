"""Second views x' made from the unnormalised picture, not from x or a partner.

Used inside the loaders, which alone have the pictures: uint8 crop -> [here] -> normalise -> x'.
    cropflip     another crop and flip of the same picture, drawn as for x
    randaugment  RandAugment of the crop that x shows (Cubuk et al. 2019, arXiv:1909.13719), with
                 torchvision's 2 operations of magnitude 9
    autoaugment  AutoAugment's policy for CIFAR-10 on that crop (Cubuk et al. 2018,
                 arXiv:1805.09501)
The operations are torchvision.transforms.v2's. They draw from torch's global generator, which is
seeded for every image from (seed, epoch, sample id, number of the view) and restored. A policy
runs on the host, image by image; for fast steps data.backend=torch moves it to workers.

KD on views stronger than crop and flip is the subject of "Understanding the Success of KD: A Data
Augmentation Perspective". The authors' later code (Good-DA-in-KD) transforms the whole batch with
one draw, on pixels recovered from the normalised x; here every image has its own draw.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastkd.data.draws import POLICY, integer_table

__all__ = ["PICTURE_VIEWS", "PictureKind", "PictureView"]

PictureKind = Literal["cropflip", "randaugment", "autoaugment"]
PICTURE_VIEWS: tuple[PictureKind, ...] = get_args(PictureKind)


@dataclass(frozen=True)
class PictureView:
    """`times` views of one kind for every picture.

    Raises:
        ValueError: another kind, or less than one view.
    """

    kind: PictureKind
    times: int = 1
    """Number of views, each with its own draws."""

    def __post_init__(self) -> None:
        if self.kind not in PICTURE_VIEWS or self.times < 1:
            raise ValueError(
                f"{self.times} views {self.kind!r}: expected 1 or more of "
                f"{', '.join(PICTURE_VIEWS)}"
            )

    @property
    def is_crop(self) -> bool:
        """Whether the view is another crop of the picture, made by the loader."""
        return self.kind == "cropflip"

    @property
    def appearances(self) -> range:
        """Their numbers; x is appearance 0 of its picture."""
        return range(1, self.times + 1)

    def of(
        self, crops_BHWC: Tensor, index_B: np.ndarray, epoch: int, *, seed: int, num_samples: int
    ) -> Tensor:
        """All views of some crops by the policy, uint8 on the host, one below the other.

        num_samples: in the split, over all ranks.
        """
        policy = _policy(self.kind)
        # As torchvision expects them, and without a copy.
        crops_BCHW = crops_BHWC.permute(0, 3, 1, 2)
        made_BHWC = crops_BHWC.new_empty(self.times * len(crops_BHWC), *crops_BHWC.shape[1:])
        row = 0
        with torch.random.fork_rng(devices=[]):
            for appearance in self.appearances:
                seeds_N = _seeds(seed, epoch, appearance, num_samples)
                for crop_CHW, own in zip(crops_BCHW, seeds_N[index_B].tolist(), strict=True):
                    # Not torch.manual_seed, which would seed the GPUs as well.
                    torch.default_generator.manual_seed(own)
                    made_BHWC[row] = policy(crop_CHW).permute(1, 2, 0)
                    row += 1
        return made_BHWC


@functools.cache
def _policy(kind: str) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    if kind == "randaugment":
        return v2.RandAugment()
    return v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)


@functools.lru_cache(maxsize=32)
def _seeds(seed: int, epoch: int, appearance: int, num_samples: int) -> np.ndarray:
    """By sample id, int64 [N]; 32 bits, the most that torch's CPU generator takes."""
    return integer_table(seed, epoch, POLICY, num_samples, 1 << 32, appearance)
