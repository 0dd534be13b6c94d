"""From the data part of a recipe to a training and a validation loader.

`open_data` is the one entry that the trainer uses: it finds the data set, decides between the
resident and the torch backend, and gives both loaders the same normalisation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Literal

import torch

from fastkd.config.section import Channels
from fastkd.data.batch import Loader
from fastkd.data.facts import Facts
from fastkd.data.geometry import Geometry
from fastkd.data.loaders.resident import ResidentLoader
from fastkd.data.loaders.torch_loader import Crop, TorchLoader
from fastkd.data.normalization import normalization
from fastkd.data.sources.by_name import decode_source, open_source
from fastkd.data.sources.cache import native_size
from fastkd.data.sources.cifar import LAYOUTS
from fastkd.data.sources.folder import FolderIndex
from fastkd.data.sources.image_set import ImageSet
from fastkd.errors import UserError

__all__ = ["RESIDENT_LIMIT_BYTES", "DataPair", "open_data"]

RESIDENT_LIMIT_BYTES = 2 << 30


@dataclass(frozen=True)
class DataPair:
    """Both loaders of a data set and what networks and reports must know about it.

    mean, std   per channel, units of 0..1, as applied        image_size  pixels, square
    name        of the data set                               backend     "resident" or "torch"
    seed        of order and augmentation

    The training images are decoded, and on their device, when `train` is first asked for: an
    evaluation does without.
    """

    open_train: Callable[[], Loader]
    val: Loader
    classes: tuple[str, ...]
    mean: Channels
    std: Channels
    image_size: int
    name: str
    backend: str
    seed: int

    @cached_property
    def train(self) -> Loader:
        """Batches of the training images."""
        return self.open_train()

    @property
    def multilabel(self) -> bool:
        """Whether an image has several labels, [N, C], and not one class id."""
        return self.val.labels_N.dim() == 2

    @property
    def facts(self) -> Facts:
        """What networks, losses and reports must know of the training images."""
        return Facts(
            image_shape=(3, self.image_size, self.image_size),
            num_classes=len(self.classes),
            labels_N=self.train.labels_N,
            multilabel=self.multilabel,
            normalization=(self.mean, self.std),
        )


def open_data(
    *,
    name: str,
    root: str | PathLike[str] | None = None,
    backend: Literal["auto", "resident", "torch"] = "auto",
    image_size: int | None = None,
    download: bool = False,
    train_limit: int | None = None,
    seed: int = 0,
    batch_size: int,
    geometry_padding: int = 0,
    geometry_mode: Literal["zero", "reflect"] = "zero",
    flip: bool = False,
    crop: Crop = "none",
    mean: Channels | None = None,
    std: Channels | None = None,
    workers: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = True,
) -> DataPair:
    """Open a data set for training and evaluation; sources are described in `open_split`.

    backend     "auto": resident unless crop is "resized" or both splits, decoded, exceed 2 GiB
    train_limit a stratified subset of the training images; validation is always whole
    crop        training: "pad" (geometry_padding, geometry_mode, then a random crop), "resized"
                (random area and aspect, evaluation at 256/224) or "none"; flip goes with each
    mean, std   None: those of the data set (`normalization`)
    workers     decoding processes of the torch backend, per rank and split

    Raises:
        UserError: data missing or damaged, a backend that cannot do this crop; from `train`, when
            it is first asked for, also that it would have no step or fewer images than processes.
    """
    if backend not in ("auto", "resident", "torch"):
        raise UserError(f"data.backend={backend!r}; choose auto, resident or torch")
    if crop not in ("pad", "resized", "none"):
        raise UserError(f"augment.crop={crop!r}; choose pad, resized or none")
    if backend == "resident" and crop == "resized":
        raise UserError(
            "data.backend=resident cannot cut random areas from the original pictures "
            "(augment.crop=resized); use data.backend=torch, or augment.crop=pad"
        )
    table_mean, table_std = normalization(name)
    mean, std = mean or table_mean, std or table_std
    train = open_source(
        name, root, "train", image_size=image_size, download=download, limit=train_limit
    )
    val = open_source(name, root, "val", image_size=image_size)
    if train.classes != val.classes:
        raise UserError(f"{name}: the class names of {train.name} and {val.name} differ")
    size = _square_size(train, name, image_size, crop)
    if backend == "auto":
        num_bytes = (len(train) + len(val)) * size * size * 3
        fits = crop != "resized" and num_bytes <= RESIDENT_LIMIT_BYTES
        backend = "resident" if fits else "torch"

    padding = geometry_padding if crop == "pad" else 0
    geometry = Geometry(padding, geometry_mode, flip)

    def loader(source: ImageSet | FolderIndex, is_train: bool) -> Loader:
        common = {
            "batch_size": batch_size,
            "seed": seed,
            "train": is_train,
            "geometry": geometry,
            "mean": mean,
            "std": std,
            "device": device,
            "dtype": dtype,
            "channels_last": channels_last,
            "rank": rank,
            "world_size": world_size,
            "drop_last": drop_last,
        }
        if backend == "resident":
            images = decode_source(source, image_size)
            return ResidentLoader(images, **common)
        return TorchLoader(source, image_size=size, crop=crop, workers=workers, **common)

    shown = loader(val, False)
    return DataPair(
        lambda: loader(train, True), shown, train.classes, mean, std, size, name, backend, seed
    )


def _square_size(
    source: ImageSet | FolderIndex, name: str, image_size: int | None, crop: Crop
) -> int:
    """Side of the images that come out, in pixels."""
    if image_size is not None:
        return image_size
    if isinstance(source, ImageSet):
        return source.images_NHWC.shape[1]
    if name in LAYOUTS:
        return 32
    if crop == "resized":
        raise UserError(
            "augment.crop=resized needs data.image_size, the side of the crops in pixels"
        )
    return native_size(source)
