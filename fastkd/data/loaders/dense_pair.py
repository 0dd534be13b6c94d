"""Builds both loaders of a set with label maps; `fastkd.data.loaders.open` calls it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from fastkd.compute.placement import Placement
from fastkd.data.batch import Loader
from fastkd.data.config import AppearanceConfig, DataConfig
from fastkd.data.facts import Facts
from fastkd.data.finish import Look
from fastkd.data.label_map_keys import wrong_appearance_key
from fastkd.data.loaders.dense import DenseLoader, ResidentDense, TorchDense
from fastkd.data.loaders.pair import DataPair, facts_of, normalization_of
from fastkd.data.loaders.planned import Loading
from fastkd.data.policies.policy import make_policy
from fastkd.data.sources.by_name import open_label_maps
from fastkd.data.sources.joint_cuts import JointView, Size
from fastkd.data.sources.label_ids import NO_CLASS
from fastkd.data.sources.label_maps import LabelMaps
from fastkd.data.sources.pairs import places
from fastkd.errors import UserError
from fastkd.storage.facts import DataFacts, Framing

__all__ = ["dense_facts", "open_both", "open_dense", "strided"]

_LOOKS = 16
"""Label maps of which the share of pixels without a class is told."""


def open_dense(
    data: DataConfig,
    appearance: AppearanceConfig,
    *,
    batch_size: int,
    seed: int,
    placement: Placement,
    limit_bytes: int,
) -> DataPair:
    """`open_data` for label maps. limit_bytes: the most that "auto" keeps on the device.

    Raises:
        UserError: data missing or damaged, keys that do not go with label maps; from `train`, when
            first used, also if images differ in size and no window is said.
    """
    if (said := wrong_appearance_key(appearance, data.name)) is not None:
        raise UserError(said)
    train, val = open_both(data)
    view = _view(data, appearance)
    sizes = _Sizes.of(train, val, view)
    backend, why = _backend(data, view, sizes, limit_bytes)
    loading = Loading(
        batch_size=batch_size,
        seed=seed,
        train=True,
        normalization=normalization_of(data),
        placement=placement,
        look=Look(make_policy(appearance.policy)),
        repeats=appearance.repeats,
        drop_last=data.drop_last,
    )

    def loader(source: LabelMaps, loading: Loading) -> Loader:
        if loading.train and sizes.window is None:
            raise UserError(
                f"{train.name}: the images differ in size, {sizes.span}, and a batch has one: set "
                f"augment.window=HEIGHT,WIDTH, cut out at random"
            )
        _check_labelled(source)
        kind = ResidentDense if backend == "resident" else TorchDense
        return kind(source, loading, view, stride=data.label_stride, workers=data.workers)

    width, height = sizes.window or sizes.largest
    evaluation = _evaluation(data, sizes)
    stride = data.label_stride
    return DataPair(
        open_train=lambda: loader(train, loading),
        val=loader(val, replace(loading, train=False)),
        facts=Facts(
            image_shape=(3, height, width),
            num_classes=len(train.classes),
            labels_N=torch.from_numpy(train.labels_N),
            label_kind="pixel",
            normalization=loading.normalization,
            classes=train.classes,
            evaluation=evaluation,
            label_size=(height // stride, width // stride),
            count_pixels=_counter(train),
        ),
        name=data.name,
        backend=backend,
        why=why,
        seed=seed,
        sources=(train, val),
        remark=lambda how: _remarks(train, val, f"{sizes.span}, {how}"),
        remember=lambda: facts_of(data, (train, val), sizes.short_side, evaluation),
    )


def strided(data: DataPair, stride: int) -> DataPair:
    """The opened data with labels at 1/stride of the size of the images, in place of data's own.

    Nothing is opened, read or counted once more.
    """

    def other(loader: Loader) -> Loader:
        assert isinstance(loader, DenseLoader)
        return loader.at_stride(stride)

    _, height, width = data.facts.image_shape
    return replace(
        data,
        open_train=lambda: other(data.train),
        val=other(data.val),
        facts=replace(data.facts, label_size=(height // stride, width // stride)),
        remember=lambda: data.remembered,
    )


def dense_facts(data: DataConfig) -> DataFacts:
    """What `open_dense(..).remembered` would be, without loaders."""
    train, val = open_both(data)
    sizes = _Sizes.of(train, val, _view(data, AppearanceConfig()))
    return facts_of(data, (train, val), sizes.short_side, _evaluation(data, sizes))


def open_both(data: DataConfig, *, broken_links: bool = False) -> tuple[LabelMaps, LabelMaps]:
    """Training and validation images, not yet read. broken_links: list them, for a check."""
    pairs = None
    if data.name == "pairs":
        pairs = places(data.root, data.image_dir, data.label_dir, data.classes_file)

    def split(name: str, limit: int | None) -> LabelMaps:
        return open_label_maps(
            data.name,
            data.root,
            name,
            pairs=pairs,
            limit=limit,
            decoding=data.decoding,
            holdout=data.holdout,
            broken_links=broken_links,
        )

    return split("train", data.train_limit), split("val", None)


def _view(data: DataConfig, appearance: AppearanceConfig) -> JointView:
    """How training images are cut."""
    window = appearance.window
    return JointView(
        short_side=data.image_size,
        multiple=data.multiple,
        train=True,
        padding=appearance.padding if appearance.crop == "pad" else 0,
        flip=appearance.flip,
        scale=appearance.scale,
        window=None if window is None else (window[1], window[0]),
    )


@dataclass(frozen=True)
class _Sizes:
    """Width and height of the pictures, as they are shown."""

    train: frozenset[Size]
    """Resized, not yet padded."""
    val: frozenset[Size]
    window: Size | None
    """Of the training images, padded; None: they differ."""
    largest: Size
    """No training image is larger, padded."""
    num_bytes: int
    """Of all pixels and labels."""

    @classmethod
    def of(cls, train: LabelMaps, val: LabelMaps, view: JointView) -> "_Sizes":
        """The headers of all files are read for it."""
        by_split = [[view.shown(size) for size in source.picture_sizes] for source in (train, val)]
        outcomes = {view.out_size(size) for size in train.picture_sizes}
        widths, heights = zip(*outcomes, strict=True)
        return cls(
            frozenset(by_split[0]),
            frozenset(by_split[1]),
            outcomes.pop() if len(outcomes) == 1 else None,
            (max(widths), max(heights)),
            sum(4 * width * height for shown in by_split for width, height in shown),
        )

    @property
    def differ(self) -> bool:
        """Within a split."""
        return max(len(self.train), len(self.val)) > 1

    @property
    def short_side(self) -> int | None:
        """Of all images; None: they differ."""
        sides = {min(size) for size in self.train | self.val}
        return sides.pop() if len(sides) == 1 else None

    @property
    def span(self) -> str:
        """The sizes of the training images in words."""
        words = [f"{width}x{height}" for width, height in sorted(self.train)]
        return f"{words[0]} pixels" if len(words) == 1 else f"{words[0]} to {words[-1]} pixels"


def _evaluation(data: DataConfig, sizes: _Sizes) -> Framing | None:
    """Whole pictures at one short side; None: as they are stored, in several sizes."""
    side = data.image_size or sizes.short_side
    return None if side is None else Framing(resize=side, crop=side, mode="whole")


def _backend(data: DataConfig, view: JointView, sizes: _Sizes, limit_bytes: int) -> tuple[str, str]:
    """Which backend serves both splits, and why, if it is for `auto`."""
    hindrance = ""
    if view.scale is not None:
        hindrance = "augment.scale resizes the pictures at random"
    elif sizes.differ:
        hindrance = "the pictures differ in size"
    if data.backend == "resident" and hindrance:
        raise UserError(
            f"data.backend=resident keeps pictures of one size on the device, and {hindrance}: use "
            "data.backend=torch"
        )
    if data.backend != "auto":
        return data.backend, ""
    if hindrance:
        return "torch", hindrance
    if sizes.num_bytes > limit_bytes:
        return "torch", f"{sizes.num_bytes / 2**30:.1f} GiB when decoded"
    return "resident", f"{sizes.num_bytes / 2**20:.0f} MiB when decoded"


def _counter(train: LabelMaps) -> Callable[[], Tensor]:
    """Counts the pixels of each class once, when first asked."""

    @cache
    def counted() -> Tensor:
        return torch.from_numpy(train.count_pixels()[:-1].copy())

    return counted


def _check_labelled(source: LabelMaps) -> None:
    """UserError if no pixel of any label map has a class; most often one map is read."""

    def labelled(sample: int) -> bool:
        try:
            return bool((source.label_map(sample) != NO_CLASS).any())
        except UserError:
            return True  # whoever needs the file names it

    if not any(map(labelled, range(len(source)))):
        raise UserError(
            f"{source.name}: no pixel of its {len(source)} label maps has a class, all hold "
            f"numbers that stand for none, such as 255: save the class numbers, from 0"
        )


def _remarks(train: LabelMaps, val: LabelMaps, how: str) -> tuple[str, ...]:
    counted = (
        f"{len(train):,} training and {len(val):,} validation images with label maps of "
        f"{len(train.classes):,} classes, {how}"
    )
    chosen = np.unique(np.linspace(0, len(train) - 1, _LOOKS).astype(int)).tolist()
    maps = [train.label_map(sample) for sample in chosen]
    share = sum(int((one == NO_CLASS).sum()) for one in maps) / sum(one.size for one in maps)
    ignored = f"{share:.1%} of the pixels of {len(maps)} label maps in {train.name} have no class"
    return (counted, ignored, *_lone_class(train, maps), *train.remarks, *val.remarks)


def _lone_class(train: LabelMaps, maps: Sequence[np.ndarray]) -> Iterator[str]:
    """A word if all label maps name the same class, as masks of 0 and 255 do."""
    if len({*np.unique(np.concatenate([one.ravel() for one in maps])).tolist()} - {NO_CLASS}) > 1:
        return
    found = np.flatnonzero(train.count_pixels()[:-1]).tolist()
    if len(found) == 1:
        yield (
            f"all label maps in {train.name} name one class only, {train.classes[found[0]]}, so "
            f"that nothing can be told apart: in masks of 0 and 255, 255 stands for no class; save "
            f"them with the numbers of the classes, 0 to {len(train.classes) - 1}"
        )
