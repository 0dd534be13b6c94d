"""What one item of a user's loader holds: images, labels, sample ids, however it is packed.

Datasets of torchvision and timm yield tuples, those of Hugging Face mappings, DALI a list of one
mapping; some add a path or a box. `fastkd.data.loaders.label_rules` decides what the labels are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkd.errors import UserError

__all__ = ["IMAGES", "LABELS", "Item", "item_of", "naming"]

IMAGES = ("images", "image", "pixel_values", "imgs", "img", "inputs", "input", "x", "data")
LABELS = ("labels", "label", "targets", "target", "y")
_MAPS = ("masks", "mask", "label_maps", "label_map", "segmentation", "annotation")
"""Of label maps, where no key of `LABELS` is there: albumentations has images and masks."""
_IDS = ("index", "indices", "idx", "ids", "id", "sample_ids", "sample_id")


class Item(NamedTuple):
    """One batch as it was yielded."""

    images_NCHW: Tensor
    """Floating point."""
    labels: Any
    """None if the loader yields images alone."""
    ids: Any
    """Sample ids, whatever else comes third, or None."""


@contextmanager
def naming(loader: str) -> Iterator[None]:
    """What is wrong with a batch, a UserError, begins with the name of its loader."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{loader}: {error}") from None


def item_of(item: Any) -> Item:
    """Images, labels and ids of an item; UserError for what cannot be told apart, or no images."""
    named = _named(item)
    if named is None and isinstance(item, tuple | list) and len(item) == 1:
        named = _named(item[0])
    if named is not None:
        images, labels, ids = _by_name(named)
    elif isinstance(item, Tensor | np.ndarray):
        images, labels, ids = item, None, None
    elif isinstance(item, tuple | list) and item:
        images, labels, ids = (*item, None, None)[:3]
    else:
        raise UserError(
            f"a loader must yield (images, labels) or (images, labels, sample ids), a mapping with "
            f"such keys, or images alone, got {type(item).__name__}; wrap it in a class whose "
            f"__iter__ picks them out"
        )
    labels = torch.as_tensor(labels) if isinstance(labels, np.ndarray | np.generic) else labels
    ids = torch.as_tensor(ids) if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu" else ids
    return Item(_images(images), labels, ids)


def _named(item: Any) -> Mapping[str, Any] | None:
    """The fields of a mapping, a dataclass, or a named tuple with one for the images."""
    if isinstance(item, Mapping):
        return item
    if is_dataclass(item) and not isinstance(item, type):
        return {field.name: getattr(item, field.name) for field in fields(item)}
    names = getattr(item, "_fields", ())
    if isinstance(item, tuple) and set(names) & {*IMAGES}:
        return dict(zip(names, item, strict=True))
    return None


def _by_name(named: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    images = [key for key in IMAGES if key in named]
    labels = [key for key in LABELS if key in named] or [key for key in _MAPS if key in named]
    ids = [key for key in _IDS if key in named]
    if len(images) != 1 or len(labels) > 1:
        what = "images" if len(images) != 1 else "labels"
        keys = ", ".join(map(str, named)) or "none"
        raise UserError(
            f"a loader must yield (images, labels) or a mapping with one key for each, got "
            f"{type(named).__name__} with the keys {keys}, of which "
            f"{'none' if not (images if what == 'images' else labels) else 'several'} can be the "
            f"{what} ({', '.join(IMAGES if what == 'images' else LABELS)}): yield (images, labels)"
        )
    return named[images[0]], named[labels[0]] if labels else None, named[ids[0]] if ids else None


def _images(images: Any) -> Tensor:
    if isinstance(images, np.ndarray) and images.dtype.kind in "fiub":
        images = torch.from_numpy(images)
    wanted = "images must be [N, C, H, W], floating point and normalised as the networks want them"
    if not isinstance(images, Tensor):
        cure = ""
        if isinstance(images, tuple | list):
            cure = f" of {len(images)}: stack one image per sample into a tensor in collate_fn"
        raise UserError(f"{wanted}, got {type(images).__name__}{cure}")
    # A plain tensor: subclasses, such as torchvision's, have operations of their own.
    images = images.as_subclass(Tensor)
    got = f"got {list(images.shape)} of {images.dtype}"
    if images.dim() != 4:
        cure = ": one image? give the DataLoader a batch_size" if images.dim() == 3 else ""
        raise UserError(f"{wanted}, {got}{cure}")
    num, channels, height, width = images.shape
    if not num:
        raise UserError(f"{wanted}, {got}: a batch without images; leave it out")
    if width in (1, 3, 4) and min(channels, height) > 4:
        raise UserError(f"{wanted}, {got}, channels last: images.permute(0, 3, 1, 2)")
    if not images.is_floating_point():
        raise UserError(
            f"{wanted}, {got}: torchvision's v2.ToDtype(torch.float32, scale=True) and "
            f"v2.Normalize(mean, std) in the data set's transform make them so"
        )
    return images
