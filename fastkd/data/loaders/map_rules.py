"""Checks the label maps of users' loaders, of which every pixel is a class id, and counts them.

Flow: `fastkd.data.loaders.label_rules` sends label maps here; the counts weigh classes in losses.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fastkd.compute.ranks import World
from fastkd.data.batch import NO_LABEL
from fastkd.data.loaders.items import item_of
from fastkd.errors import UserError

__all__ = ["MAPS", "checked_maps", "pixel_counter"]

MAPS = "label maps must be [N, H, W], whole numbers: the class id of every pixel"
_COLOURS = (3, 4)


def checked_maps(labels: Tensor, images_NCHW: Tensor, num_classes: int | None) -> Tensor:
    """Label maps int64 [N, H, W] of these images, of [N, H, W] or [N, 1, H, W] of any whole type.

    num_classes: class ids are checked against it if they are on the host; None: no check.

    Raises:
        UserError: they are something else, such as an RGB picture of the labels.
    """
    got = f"got {list(labels.shape)} of {labels.dtype}"
    if labels.dim() == 4 and labels.shape[1] == 1:
        labels = labels.squeeze(1)
    elif labels.dim() == 4 and (axis := _one_hot_axis(labels, num_classes)) is not None:
        raise UserError(
            f"{MAPS}; {got} is one-hot, a channel for each class: labels.argmax({axis})"
        )
    elif labels.dim() == 4 and (labels.shape[1] in _COLOURS or labels.shape[3] in _COLOURS):
        raise UserError(
            f"{MAPS}; {got} looks like an RGB picture of the labels: load it without convert('RGB')"
        )
    if labels.dim() != 3:
        raise UserError(f"{MAPS}; {got}")
    if labels.is_floating_point() or labels.is_complex():
        cure = "v2.ToDtype or ToTensor scales them to 0..1: load them as they are stored"
        if labels.numel() and bool((labels.real == labels.real.round()).all()):
            cure = "labels.long()"
        raise UserError(f"{MAPS}; {got}: {cure}")
    if len(labels) != len(images_NCHW):
        raise UserError(f"{MAPS}; {got}, for {len(images_NCHW)} images")
    _check_size(labels, images_NCHW)
    return _checked_classes(labels.long(), num_classes)


def _one_hot_axis(labels: Tensor, classes: int | None) -> int | None:
    """Of the classes, in label maps of one channel per class; None: they are something else."""
    for axis in (1, 3):
        if labels.shape[axis] == classes and bool((labels.sum(axis) == 1).all()):
            return axis
    return None


def _check_size(labels_NHW: Tensor, images_NCHW: Tensor) -> None:
    """UserError unless the images are as large as the maps, or larger by a whole factor."""
    (height, width), (rows, columns) = images_NCHW.shape[2:], labels_NHW.shape[1:]
    factor = height // max(rows, 1)
    if (rows * factor, columns * factor) != (height, width):
        raise UserError(
            f"the label maps have {rows}x{columns} pixels (height x width) and their images "
            f"{height}x{width}: resize both together, the maps by nearest; maps of a half or "
            f"an eighth of the size are fine"
        )


def _checked_classes(labels_NHW: Tensor, classes: int | None) -> Tensor:
    # On the device the checks would wait.
    if classes is None or labels_NHW.device.type != "cpu" or not labels_NHW.numel():
        return labels_NHW
    least, most = torch.aminmax(labels_NHW)
    if least >= 0 and most < classes:
        return labels_NHW
    wrong = labels_NHW[((labels_NHW < 0) & (labels_NHW != NO_LABEL)) | (labels_NHW >= classes)]
    if not wrong.numel():
        return labels_NHW
    value = 255 if bool((wrong == 255).any()) else int(wrong[0])
    cure = "build it with more classes, or renumber"
    if value == 255:
        cure = (
            f"if these pixels are to be ignored, labels = labels.long(); "
            f"labels[labels == 255] = {NO_LABEL}"
        )
    raise UserError(
        f"the label maps hold {value}, which is not a class of a network with {classes}, "
        f"numbered from 0 (and {NO_LABEL}: ignored): {cure}"
    )


def pixel_counter(
    items: Iterable[Any], num_classes: int, world: World
) -> Callable[[], Tensor] | None:
    """What counts the pixels of each class, where label maps can be read without images."""
    dataset = getattr(items, "dataset", None)
    maps: list[Any] = []
    if type(dataset) is TensorDataset and len(dataset.tensors) > 1:
        maps = [dataset.tensors[1]]
    elif isinstance(items, list | tuple) and world.size == 1:
        # Of several ranks, each has a list of its own.
        maps = [item_of(item).labels for item in items]
    if not maps or not all(isinstance(one, Tensor) for one in maps):
        return None

    def count() -> Tensor:
        counts_C = torch.zeros(num_classes, dtype=torch.int64)
        for one in maps:
            ids = one.cpu().long()
            known = ids[(ids >= 0) & (ids < num_classes)]
            counts_C += torch.bincount(known, minlength=num_classes)
        return counts_C

    return count
