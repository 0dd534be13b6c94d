"""Second views x' made from the picture of x, not from x and a partner.

Used inside the loaders, which alone have the pictures: uint8 crop -> policy -> normalise -> x'.
    cropflip     another crop and flip of the same picture, with another draw of x's policy
    randaugment  RandAugment of what x shows, with torchvision's 2 operations of magnitude 9
    autoaugment  AutoAugment of what x shows

KD on views stronger than crop and flip is the subject of "Understanding the Success of KD: A Data
Augmentation Perspective". The authors' later code (Good-DA-in-KD) transforms the whole batch with
one draw, on pixels recovered from the normalised x; here every image has its own draw.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from fastkd.data.policies.policy import Policy, make_policy

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

    @cached_property
    def policy(self) -> Policy | None:
        """What makes the view of what x shows; None for another crop."""
        return None if self.kind == "cropflip" else make_policy(self.kind)

    @property
    def appearances(self) -> range:
        """Their numbers; x is appearance 0 of its picture."""
        return range(1, self.times + 1)
