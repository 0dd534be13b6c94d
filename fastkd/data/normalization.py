"""Mean and standard deviation of each data set, per RGB channel, in units of 0..1.

cifar10, cifar100: the constants of the Moonshine code (spec, section 1.8), which most published
CIFAR results use; those std values are means of per-image deviations, smaller than the true ones.
folder, sets of photographs and of label maps: ImageNet's, what pretrained models expect. digits:
measured on its 300 training images.
"""

from typing import Literal

from fastkd.config.section import Normalization
from fastkd.errors import UserError

__all__ = ["DATASETS", "LABEL_MAPS", "PHOTOGRAPHS", "DataName", "normalization"]

DataName = Literal[
    "digits",
    "cifar10",
    "cifar100",
    "tiny_imagenet",
    "voc2007",
    "cub200",
    "birdsnap",
    "cityscapes",
    "camvid",
    "voc_segmentation",
    "pairs",
    "folder",
    "synthetic",
]
PHOTOGRAPHS: tuple[DataName, ...] = ("voc2007", "cub200", "birdsnap", "folder")
"""Sets of pictures of any size."""
LABEL_MAPS: tuple[DataName, ...] = ("cityscapes", "camvid", "voc_segmentation", "pairs")
"""Sets that label every pixel."""

_IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

DATASETS: dict[str, Normalization] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023)),
    "digits": ((0.3063, 0.3063, 0.3063), (0.3191, 0.3191, 0.3191)),
    "tiny_imagenet": _IMAGENET,
    "voc2007": _IMAGENET,
    "cub200": _IMAGENET,
    "birdsnap": _IMAGENET,
    **dict.fromkeys(LABEL_MAPS, _IMAGENET),
    "folder": _IMAGENET,
    "synthetic": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}


def normalization(name: str) -> Normalization:
    """(mean, std) of a data set by name.

    Raises:
        UserError: no such data set; the message lists them.
    """
    if name not in DATASETS:
        raise UserError(f"data.name={name!r} is not a data set; choose {', '.join(DATASETS)}")
    return DATASETS[name]
