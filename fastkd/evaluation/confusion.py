"""Which class was predicted for which: exact counts of pixels, and what follows from them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.evaluation.headline import headline

__all__ = ["by_class", "confused", "of_confusion", "reached"]


def confused(predicted_NHW: Tensor, labels_NHW: Tensor, num_classes: int) -> Tensor:
    """Pixels by label (rows) and predicted class (columns), int64 [C, C]; negative labels do not
    count."""
    known = labels_NHW >= 0
    places = labels_NHW[known] * num_classes + predicted_NHW[known]
    return torch.bincount(places, minlength=num_classes**2).view(num_classes, num_classes)


def of_confusion(counts_CC: Tensor) -> dict[str, Any]:
    """Metrics of a confusion matrix.

    `miou`: the mean over the classes that occur, as label or as prediction, of intersection over
    union (true pixels of a class over all that are labelled or predicted so), as in Cityscapes'
    own script. `pixel_accuracy`: the share of pixels that are right. `class_iou`: by class, None
    for one that does not occur. `chance`: the mean IoU of who never looks at the image, the larger
    of always naming the commonest class and of naming each as often as it is labelled, at random.
    """
    counts_CC = counts_CC.double().cpu()
    true_C, labelled_C, predicted_C = counts_CC.diagonal(), counts_CC.sum(1), counts_CC.sum(0)
    union_C = labelled_C + predicted_C - true_C
    occurs_C = union_C > 0
    iou_C = true_C / union_C
    pixels = max(labelled_C.sum().item(), 1)
    share_C = labelled_C[labelled_C > 0] / pixels
    # Named at random, a class of share p is right on p^2 of the pixels, and labelled or named on
    # 2p - p^2 of them.
    blind = max(share_C.max(), (share_C / (2 - share_C)).sum()) if len(share_C) else 0.0
    return {
        "miou": iou_C[occurs_C].mean().item() if occurs_C.any() else 0.0,
        "pixel_accuracy": true_C.sum().item() / pixels,
        "class_iou": [
            iou if occurs else None
            for iou, occurs in zip(iou_C.tolist(), occurs_C.tolist(), strict=True)
        ],
        "chance": float(blind) / max(len(share_C), 1),
    }


def by_class(
    scores: Sequence[float | None], classes: Sequence[str] | None
) -> dict[str, float | None]:
    """Scores by class name; by class id where the names are not known."""
    names = classes if classes is not None else [str(number) for number in range(len(scores))]
    return dict(zip(names, scores, strict=True))


def reached(found: Mapping[str, Any], classes: Sequence[str] | None) -> dict[str, Any]:
    """What a summary says of an evaluation: the headline metric; of pixels also every class's."""
    metric = headline(found)
    said = {metric: found[metric]}
    if "class_iou" in found:
        said["class_iou"] = by_class(found["class_iou"], classes)
    return said
