"""Builds a training and a validation loader from the data part of a recipe.

`open_data` is the only entry point for the trainer: it finds the data set, decides between the
resident and the torch backend, and gives both loaders the same normalisation.
"""

from dataclasses import replace

import numpy as np
import torch

from fastkd.compute.placement import Placement
from fastkd.data.batch import Loader
from fastkd.data.config import AppearanceConfig, DataConfig
from fastkd.data.facts import Facts
from fastkd.data.finish import Look
from fastkd.data.framing import evaluation_framing
from fastkd.data.geometry import Crop, Geometry
from fastkd.data.label_map_keys import wrong_appearance_key
from fastkd.data.loaders.dense_pair import dense_facts, open_dense
from fastkd.data.loaders.pair import DataPair, facts_of, normalization_of
from fastkd.data.loaders.planned import Loading
from fastkd.data.loaders.resident import ResidentLoader
from fastkd.data.loaders.streaming import StreamingLoader
from fastkd.data.loaders.torch_loader import TorchLoader
from fastkd.data.normalization import LABEL_MAPS
from fastkd.data.policies.policy import make_policy
from fastkd.data.sources.by_name import decode_source, open_source
from fastkd.data.sources.cache import native_size
from fastkd.data.sources.cifar import LAYOUTS
from fastkd.data.sources.folder import FolderIndex
from fastkd.data.sources.holdout import Holdout
from fastkd.data.sources.image_set import ImageSet, first_labels
from fastkd.data.sources.shards import CLASSES, ShardIndex
from fastkd.data.sources.survey import survey
from fastkd.errors import UserError
from fastkd.storage.facts import DataFacts, Framing

__all__ = ["RESIDENT_LIMIT_BYTES", "DataPair", "data_facts", "open_data"]

RESIDENT_LIMIT_BYTES = 2 << 30

_Images = tuple[ImageSet | FolderIndex, ImageSet | FolderIndex]


def open_data(
    data: DataConfig,
    appearance: AppearanceConfig,
    *,
    batch_size: int,
    seed: int,
    placement: Placement,
) -> DataPair:
    """Open a data set for training and evaluation; sources are described in `open_split`.

    The backend "auto" is resident unless the crop is "resized" or both splits, decoded, exceed
    2 GiB. data.train_limit takes a stratified subset of the training images; validation is whole,
    and shows pictures as `evaluation_framing` says. Sets with label maps: `open_dense`.

    Raises:
        UserError: data missing or damaged, a backend that cannot do this crop; from `train`, when
            first used, also if it would have no step or fewer images than processes.
    """
    if data.name in LABEL_MAPS:
        return open_dense(
            data,
            appearance,
            batch_size=batch_size,
            seed=seed,
            placement=placement,
            limit_bytes=RESIDENT_LIMIT_BYTES,
        )
    crop = appearance.crop
    if data.backend == "resident" and crop == "resized":
        raise UserError(
            "data.backend=resident cannot cut random areas from the original pictures "
            "(augment.crop=resized); use data.backend=torch, or augment.crop=pad"
        )
    if (said := wrong_appearance_key(appearance, data.name)) is not None:
        raise UserError(said)
    train, val = _open_sources(data)
    size = _square_size(train, data, crop)
    backend, why = _backend(data, crop, (len(train) + len(val)) * size * size * 3)
    loading = Loading(
        batch_size=batch_size,
        seed=seed,
        train=True,
        normalization=normalization_of(data),
        placement=placement,
        geometry=Geometry(
            padding=appearance.padding if crop == "pad" else 0,
            pad_mode=appearance.pad_mode,
            flip=appearance.flip,
        ),
        interpolation=appearance.interpolation,
        look=Look(make_policy(appearance.policy, appearance.randaugment), appearance.erasing),
        repeats=appearance.repeats,
        drop_last=data.drop_last,
    )

    evaluation = evaluation_framing(data, train, size)
    whole = Framing.whole(size)
    skips = data.on_bad == "skip"

    def loader(source: ImageSet | FolderIndex, loading: Loading, framing: Framing) -> Loader:
        if backend == "resident":
            # Without a size all pictures must have the same, which decoding then checks.
            as_stored = data.image_size is None and framing == whole
            shown = None if as_stored else framing
            return ResidentLoader(decode_source(source, shown, skips=skips), loading)
        return streaming_loader(backend)(
            source,
            loading,
            image_size=framing.crop,
            crop=crop,
            workers=data.workers,
            framing=framing,
            skips=skips,
        )

    labels_N = torch.from_numpy(train.labels_N)
    return DataPair(
        open_train=lambda: loader(train, loading, whole),
        val=loader(val, replace(loading, train=False), evaluation),
        facts=Facts(
            image_shape=(3, size, size),
            num_classes=len(train.classes),
            labels_N=labels_N,
            label_kind="multi" if labels_N.dim() == 2 else "class",
            normalization=loading.normalization,
            classes=train.classes,
            evaluation=evaluation,
        ),
        name=data.name,
        backend=backend,
        why=why,
        seed=seed,
        sources=(train, val),
        remark=lambda how: _remarks(train, val, f"{size}x{size} pixels, {how}"),
        remember=lambda: facts_of(data, (train, val), size, evaluation),
    )


def _backend(data: DataConfig, crop: Crop, num_bytes: int) -> tuple[str, str]:
    """Which backend serves both splits of so many decoded bytes, and why, if it is for `auto`."""
    if data.backend != "auto":
        return data.backend, ""
    if crop == "resized":
        return "torch", "random areas are cut from the files"
    if num_bytes > RESIDENT_LIMIT_BYTES:
        return "torch", f"{num_bytes / 2**30:.1f} GiB when decoded"
    return "resident", f"{num_bytes / 2**20:.0f} MiB when decoded"


def streaming_loader(backend: str) -> type[StreamingLoader]:
    """The loader of a backend that decodes batch by batch. UserError if it is not installed."""
    if backend == "torch":
        return TorchLoader
    from fastkd.data.loaders.dali_loader import DaliLoader  # needs an extra

    return DaliLoader


def data_facts(data: DataConfig) -> DataFacts:
    """What `open_data(..).remembered` would be, without loaders."""
    if data.name in LABEL_MAPS:
        return dense_facts(data)
    train, val = _open_sources(data)
    size = _square_size(train, data, "none")
    return facts_of(data, (train, val), size, evaluation_framing(data, train, size))


def _open_sources(data: DataConfig) -> _Images:
    train = open_source(
        data.name,
        data.root,
        "train",
        image_size=data.image_size,
        download=data.download,
        limit=data.train_limit,
        decoding=data.decoding,
        holdout=data.holdout,
        labels=data.labels,
    )
    val = open_source(
        data.name,
        data.root,
        "val",
        image_size=data.image_size,
        decoding=data.decoding,
        holdout=data.holdout,
        labels=data.labels,
    )
    if train.classes != val.classes:
        cure = ""
        if isinstance(train, ShardIndex):
            cure = f": {len(train.classes)} and {len(val.classes)}; name them in {CLASSES}"
        raise UserError(f"{data.name}: the class names of {train.name} and {val.name} differ{cure}")
    if data.tune_share is not None:
        return _for_tuning(train, data.name, Holdout(data.tune_share, data.val_seed))
    return train, val


def _for_tuning(train: ImageSet | FolderIndex, name: str, holdout: Holdout) -> _Images:
    """The training images in two parts, of which the second serves for validation."""
    if isinstance(train, FolderIndex):
        files = [bytes(file) for file in train.files_N]
    else:
        files = [str(sample).encode() for sample in range(len(train))]
    labels_N = first_labels(train.labels_N)
    if (np.bincount(labels_N) < 2).all():
        raise UserError(
            f"data.tune_share={holdout.share:g}: every class of {train.name} has one image, so "
            "none can be held back; add images, or leave it out"
        )
    left, held = (
        train.take(holdout.positions(files, labels_N, split)) for split in ("train", "val")
    )
    held = replace(held, name=f"{name}/tune")
    if isinstance(left, FolderIndex):
        left = left.remarked(
            f"{len(held)} of the {len(train)} training images take the place of the validation "
            f"images (data.tune_share={holdout.share:g} data.val_seed={holdout.seed})"
        )
    if isinstance(held, FolderIndex):
        held = replace(held, remarks=())
    return left, held


def _remarks(
    train: ImageSet | FolderIndex, val: ImageSet | FolderIndex, how: str
) -> tuple[str, ...]:
    """What was found in a folder; the other sets hold what they always hold."""
    if not (isinstance(train, FolderIndex) and isinstance(val, FolderIndex)):
        return ()
    counted = (
        f"{len(train):,} training and {len(val):,} validation images of {len(train.classes):,} "
        f"classes, {how}"
    )
    return (counted, *train.remarks, *survey(train), *val.remarks, *survey(val))


def _square_size(source: ImageSet | FolderIndex, data: DataConfig, crop: Crop) -> int:
    """Side of the output images, in pixels."""
    if data.image_size is not None:
        return data.image_size
    if isinstance(source, ImageSet):
        return source.images_NHWC.shape[1]
    if data.name in LAYOUTS:
        return 32
    if crop == "resized":
        raise UserError(
            "augment.crop=resized needs data.image_size, the side of the crops in pixels"
        )
    return native_size(source, skips=data.on_bad == "skip")
