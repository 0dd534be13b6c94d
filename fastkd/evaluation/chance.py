"""What guessing reaches: the floor under teachers and students, by one rule.

Whoever always names the commonest class of the validation images has learned nothing, so that is
what a network must beat: not 1 in the number of classes, which such an answer beats where classes
are of unequal size, and not the commonest class of the training images, of which the validation
images may have an equal share.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.evaluation.headline import headline

__all__ = ["Chance", "chance_of", "class_counts"]


@dataclass(frozen=True)
class Chance:
    """The validation results of a network that has learned nothing from the images."""

    accuracy: float
    """Of always naming the commonest class; with several labels, mAP of scores that say nothing; of
    pixels, mIoU of answers that do not depend on the image."""
    floor: float
    """Above this accuracy, mAP or mIoU it is no coincidence."""
    loss: float
    """Cross entropy of giving every class the same probability."""

    def beaten_by(self, reached: float) -> bool:
        """Whether a network with this accuracy, mAP or mIoU has learned something."""
        return reached > self.floor


def class_counts(labels_N: Tensor, num_classes: int) -> Tensor:
    """Images of each class [C], on the CPU; a negative class id is no label.

    Of images with several labels [N, C], or of labelled pixels, there is no such number: zeros.
    """
    known = labels_N[labels_N >= 0].cpu() if labels_N.dim() == 1 else labels_N.new_empty(0).cpu()
    return torch.bincount(known.long(), minlength=num_classes)


def chance_of(counts_C: Tensor, found: Mapping[str, Any] | None = None) -> Chance:
    """counts_C: validation images of each class.

    found: the evaluation that is judged, or the summary of its run; of several labels, and of
        pixels, it says itself what chance is.
    """
    num_classes, samples = len(counts_C), int(counts_C.sum())
    share = counts_C.max().item() / samples if samples else 1 / num_classes
    if found and "chance" in found and headline(found) == "miou":
        # Of so many pixels a share has no deviation to speak of.
        return Chance(found["chance"], found["chance"], math.log(num_classes))
    if found and "chance" in found:
        share, samples = found["chance"], int(found["samples"])
    samples = max(samples, 1)
    # Two standard deviations of a share that is measured on so many samples. Right answers to all
    # are enough where that is out of reach.
    floor = min(share + 2 * (share * (1 - share) / samples) ** 0.5, 1 - 1 / samples)
    return Chance(share, floor, math.log(num_classes))
