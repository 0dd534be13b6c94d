"""What networks, losses and reports must know about a data set, however it is loaded."""

from dataclasses import dataclass

from torch import Tensor

from fastkd.config.section import Normalization
from fastkd.storage.facts import Framing

__all__ = ["Facts"]


@dataclass(frozen=True)
class Facts:
    """Shape of the images, classes, labels by sample id, normalisation."""

    image_shape: tuple[int, int, int]
    """[C, H, W] of the images that networks get."""
    num_classes: int
    labels_N: Tensor
    """int64 labels of all training samples by sample id, on the CPU; [N, C] if `multilabel`."""
    multilabel: bool
    """Whether an image has several labels, and not one class id."""
    normalization: Normalization
    """Channel means and standard deviations in 0..1 that the loader has applied."""
    classes: tuple[str, ...] | None = None
    """Names by label; None if the loader does not know them."""
    evaluation: Framing | None = None
    """How pictures are shown in evaluation; None if a loader of the user's decides it."""
    labelled: bool = True
    """Whether training images have labels, as their first batch shows."""
