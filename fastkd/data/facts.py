"""What networks, losses and reports must know about a data set, however it is loaded."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastkd.config.section import Normalization
from fastkd.data.batch import LabelKind
from fastkd.storage.facts import Framing

__all__ = ["Facts"]


@dataclass(frozen=True)
class Facts:
    """Shape of the images, classes, labels by sample id, normalisation."""

    image_shape: tuple[int, int, int]
    """[C, H, W] of the images that networks get."""
    num_classes: int
    labels_N: Tensor
    """int64 labels of all training samples by sample id, on the CPU; [N, C] of several labels, and
    NO_LABEL [N] where pixels are labelled: label maps stay with the loader."""
    label_kind: LabelKind
    """What is labelled."""
    normalization: Normalization
    """Channel means and standard deviations in 0..1 that the loader has applied."""
    classes: tuple[str, ...] | None = None
    """Names by label; None if the loader does not know them."""
    evaluation: Framing | None = None
    """How pictures are shown in evaluation; None: whole, as they are stored, or as a loader of the
    user's decides."""
    labelled: bool = True
    """Whether training images have labels, as their first batch shows."""
    label_size: tuple[int, int] | None = None
    """[H, W] of the label maps in training, where pixels are labelled."""
    count_pixels: Callable[[], Tensor] | None = None
    """Training pixels of each class, int64 [C], where pixels are labelled; all label maps are read
    for it. None: not known."""

    @property
    def shown(self) -> str:
        """`evaluation` of a set of pictures, in words."""
        return str(self.evaluation or "whole pictures as they are stored")
