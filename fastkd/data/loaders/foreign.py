"""Adapts users' own loaders, as passed to `fastkd.distill`, to the trainer's protocol.

Their shuffling and augmentation follow from (seed, epoch, step, rank), so that a resumed run sees
what an uninterrupted one would have seen. The price: batches before the step are drawn again.
"""

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from fastkd.compute.placement import Placement
from fastkd.compute.ranks import World
from fastkd.data.batch import Batch, SecondViews
from fastkd.data.facts import Facts
from fastkd.data.loaders.label_rules import LabelRules
from fastkd.data.picture_views import PictureView
from fastkd.errors import UserError

__all__ = [
    "ForeignLoader",
    "ForeignPair",
    "LoaderItem",
    "Shown",
    "check_loader",
    "images_per_epoch",
    "open_foreign",
    "peek",
]

LoaderItem = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


class Shown(NamedTuple):
    """The first batch of a loader."""

    images_NCHW: Tensor
    labels_N: Tensor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, W]."""
        _, channels, height, width = self.images_NCHW.shape
        return (channels, height, width)

    @property
    def multilabel(self) -> bool:
        """Whether an image has several labels, [N, C], instead of one class id."""
        return self.labels_N.dim() == 2


def peek(items: Iterable[LoaderItem], device: torch.device, *, channels_last: bool) -> Shown:
    """The first batch, on the device; UserError if there is none."""
    item = next(iter(items), None)
    if item is None:
        raise UserError("a loader yields nothing: its first batch is missing")
    images, labels, _ = _parts(item, LabelRules(), device, _layout(channels_last))
    return Shown(images, labels)


def images_per_epoch(items: Iterable[LoaderItem], batch_size: int) -> int:
    """Number of images in the data set; without a data set, full batches of `batch_size`."""
    return _num_samples(items) or _steps(items) * batch_size


class ForeignLoader:
    """The user's loader, one per rank, with this rank's share of the images.

    train: False for evaluation, where the ranks' batches may differ.
    Labels are class ids [N], or [N, C] if images have several (then float32: 1, 0, -1 unknown).
    """

    def __init__(
        self,
        items: Iterable[LoaderItem],
        placement: Placement,
        seed: int,
        rules: LabelRules | None = None,
        *,
        train: bool = True,
    ) -> None:
        self.items = items
        self.world = placement.world
        self.device = placement.device
        self.layout = _layout(placement.channels_last)
        self.seed = seed
        self.rules = rules or LabelRules()
        self.train = train
        self.steps_per_epoch = _steps(items)
        self.labels_N = _labels_by_id(items, self.rules)
        """Labels by sample id if a loss needs ids, then compared with every batch; else zeros."""
        self._compared = False
        # Sizes are compared on the host: NCCL would wait for the device.
        shared = train and self.world.size > 1
        self._ranks: Any = dist.new_group(backend="gloo") if shared else None

    @property
    def batch_rows(self) -> tuple[int, ...]:
        """As a DataLoader plans them, or as a list has them."""
        if isinstance(self.items, list | tuple):
            return tuple(sorted({len(item[0]) for item in self.items}, reverse=True))
        sampler = self.items.batch_sampler if isinstance(self.items, DataLoader) else None
        if type(sampler) is not BatchSampler:
            return ()
        num, size = len(sampler.sampler), sampler.batch_size  # type: ignore[arg-type]
        rest = 0 if sampler.drop_last else num % size
        return tuple(rows for rows in (size if num >= size else 0, rest) if rows)

    def with_views(self, views: SecondViews) -> Self:
        """This loader itself: each rank mixes its own images, and there are no pictures.

        UserError for second views of the pictures.
        """
        if isinstance(views, PictureView):
            raise UserError(
                f"xprime={views.kind!r} is made of the pictures as they are stored, and a loader "
                f"of your own gives normalised images: choose cutmix, mixup or cutout, or run a "
                f"recipe with data.name=folder"
            )
        return self

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches on the device; batches before `start_step` are drawn and discarded."""
        for part in (self.items, getattr(self.items, "sampler", None)):
            set_epoch = getattr(part, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
        # A shuffling DataLoader draws its order from its own generator or the global one, and the
        # images of a batch from the global one: the same in every replay, wherever it starts.
        seed = ((self.seed * 1_000_003 + epoch) * 1_003 + self.world.rank) & 0x7FFFFFFF
        for part in (self.items, getattr(self.items, "sampler", None)):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
        torch.manual_seed(seed)
        items = iter(self.items)
        for step in range(self.steps_per_epoch):
            torch.manual_seed(seed << 32 | step)
            item = next(items, None)
            if item is None:
                return
            if step < start_step:
                continue
            images, labels, ids = _parts(item, self.rules, self.device, self.layout)
            if self.rules.wants_ids and ids is None:
                raise UserError(
                    f"the loss {self.rules.wants_ids} keeps state per sample: make the training "
                    f"loader yield (images, labels, sample ids)"
                )
            if self.rules.wants_ids:
                self._check_ids(ids, item[1])
            if ids is None:
                ids = torch.full((len(labels),), -1, device=self.device)
            ids = ids.to(self.device, non_blocking=True)
            yield Batch(images, labels, ids, self._global_size(len(labels)))

    def _global_size(self, num: int) -> int:
        """Size of the global batch, given `num` images on this rank; 0 in an evaluation.

        Raises:
            UserError: the ranks have batches of different sizes, which cannot be averaged.
        """
        if not self.train:
            return 0
        if self._ranks is None:
            return num
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world.size)]
        dist.all_gather(sizes, torch.tensor([num]), group=self._ranks)
        found = [int(size) for size in sizes]
        if min(found) != max(found):
            raise UserError(
                f"the processes have batches of different sizes ({found}); give the loader a "
                f"torch DistributedSampler, which makes them equal"
            )
        return sum(found)

    def _check_ids(self, ids: Any, labels: Tensor) -> None:
        """UserError for ids without a sample, and for labels that differ from the loss's record."""
        if not isinstance(ids, Tensor) or ids.shape != labels.shape[:1] or ids.is_floating_point():
            got = f"{list(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids)
            raise UserError(f"sample ids must be whole numbers [N], one per image; got {got}")
        on_host = ids.device.type == labels.device.type == "cpu"
        # If the labels are on a GPU, wait for them once, not in every step.
        if self._compared and not on_host:
            return
        self._compared = True
        ids_N, labels_N, num = ids.cpu().long(), labels.cpu(), len(self.labels_N)
        wrong_N = (ids_N < 0) | (ids_N >= num)
        if wrong_N.any():
            raise UserError(
                f"the loss {self.rules.wants_ids} keeps state for {num} samples, as many as the "
                f"loader's dataset has `targets`, but a batch has the sample id "
                f"{int(ids_N[wrong_N][0])}: yield the position of the image in `targets` as its id"
            )
        known_N = self.labels_N[ids_N]
        wrong_N = (known_N != labels_N).view(len(ids_N), -1).any(1)
        if wrong_N.any():
            raise UserError(
                f"the sample {int(ids_N[wrong_N][0])} comes with the label "
                f"{labels_N[wrong_N][0].tolist()}, but the dataset's `targets`, which the loss "
                f"{self.rules.wants_ids} uses, say {known_N[wrong_N][0].tolist()}: make `targets` "
                f"and the ids what the loader yields (a target_transform changes only the labels)"
            )


def _parts(
    item: Any, rules: LabelRules, device: torch.device, layout: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images and labels on the device, and the sample ids if there are any."""
    if not isinstance(item, tuple | list) or not 2 <= len(item) <= 3:
        raise UserError(
            f"a loader must yield (images, labels) or (images, labels, sample ids), got "
            f"{type(item).__name__}; wrap it in a generator class that picks them out"
        )
    images, labels, *ids = item
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        what = (
            f"{list(images.shape)} of {images.dtype}"
            if isinstance(images, Tensor)
            else type(images).__name__
        )
        raise UserError(
            f"images must be [N, C, H, W], floating point and normalised as the networks want "
            f"them, got {what}: torchvision's v2.ToDtype(torch.float32, scale=True) and "
            f"v2.Normalize(mean, std) in the data set's transform make them so"
        )
    # The networks and the mixes of images want fp32; a loader of numpy arrays gives fp64.
    images = images.to(device, torch.float32, non_blocking=True, memory_format=layout)
    rules.check(labels)
    multilabel = labels.dim() == 2
    if rules.multilabel not in (None, multilabel):
        kinds = {True: "[N, classes], several per image", False: "[N], one class id per image"}
        raise UserError(
            f"this loader gives labels {kinds[multilabel]}, another one of this run gives "
            f"{kinds[not multilabel]}: make them alike"
        )
    dtype = torch.float32 if multilabel else torch.int64
    labels = labels.to(device, dtype, non_blocking=True)
    return images, labels, ids[0] if ids else None


@dataclass(frozen=True)
class ForeignPair:
    """Both of the user's loaders, and what networks and losses must know about them."""

    train: ForeignLoader
    val: ForeignLoader
    facts: Facts


def open_foreign(
    train_items: Iterable[LoaderItem],
    val_items: Iterable[LoaderItem],
    shown: Shown,
    *,
    num_classes: int,
    seed: int,
    placement: Placement,
    wants_ids: str | None = None,
    wants_classes: str | None = None,
) -> ForeignPair:
    """Both loaders in the trainer's protocol.

    shown: the first batch of one of them; both yield labels of its kind.
    wants_ids, wants_classes: what losses need from the training labels, see `LabelRules`.

    Raises:
        UserError: a loss wants sample ids and the data set does not say its labels.
    """
    val_rules = LabelRules(multilabel=shown.multilabel, num_classes=num_classes)
    rules = replace(val_rules, wants_ids=wants_ids, wants_classes=wants_classes)
    train = ForeignLoader(train_items, placement, seed, rules)
    val = ForeignLoader(val_items, placement, seed, val_rules, train=False)
    facts = Facts(
        image_shape=shown.image_shape,
        num_classes=num_classes,
        labels_N=train.labels_N,
        multilabel=shown.multilabel,
        normalization=((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    )
    return ForeignPair(train, val, facts)


def check_loader(
    name: str, loader: Iterable[LoaderItem], world: World, *, exact: bool = False
) -> None:
    """UserError for a loader that has no length, can be read only once, or is not sharded.

    exact: the ranks together must see every image once, as in an evaluation.
    """
    wanted = "a torch DataLoader over a map-style data set"
    try:
        if not isinstance(loader, Sized) or not len(loader):
            raise TypeError
    except TypeError:
        raise UserError(f"{name} needs a length above 0: {wanted}") from None
    if isinstance(loader, Iterator):
        raise UserError(f"{name} can be read only once, and an epoch is not enough: {wanted}")
    if world.size == 1 or not isinstance(loader, DataLoader):
        return
    shares = "sampler=torch.utils.data.DistributedSampler(dataset)"
    if exact:
        shares = "sampler=range(rank, len(dataset), world_size)"
    # A DataLoader with a batch sampler, which may shard, also has a sampler that it does not use.
    own = type(loader.batch_sampler) is not BatchSampler and loader.batch_sampler is not None
    if not own and isinstance(loader.sampler, RandomSampler | SequentialSampler):
        raise UserError(
            f"{name} gives each of the {world.size} processes all images: pass {shares} to the "
            f"DataLoader"
        )
    if exact and isinstance(loader.sampler, DistributedSampler):
        images = len(loader.sampler.dataset)  # type: ignore[arg-type]
        if images % world.size:
            raise UserError(
                f"{name} counts some images twice or not at all: its DistributedSampler gives each "
                f"of the {world.size} processes equally many of {images}: pass {shares} instead"
            )


def _labels_by_id(items: Iterable[LoaderItem], rules: LabelRules) -> Tensor:
    """The data set's `targets` if a loss needs ids; UserError if they are not labels.

    Zeros if no loss does: a data set's `targets` can be anything; in torchvision's VOC they
    are file names.
    """
    if rules.wants_ids is None:
        return torch.zeros(_num_samples(items), dtype=torch.int64)
    wanted = (
        f"the loss {rules.wants_ids} needs the label of every training sample: give the "
        f"loader's dataset an attribute `targets`, a list of labels by sample id"
    )
    targets = getattr(getattr(items, "dataset", None), "targets", None)
    if targets is None:
        raise UserError(wanted)
    try:
        targets_M = torch.as_tensor(targets).cpu()
        rules.check(targets_M)
    except (TypeError, ValueError, RuntimeError, UserError) as error:
        raise UserError(f"{wanted}; in what it has, {error}") from None
    if targets_M.dim() != 1 + bool(rules.multilabel):
        raise UserError(f"{wanted} as it yields them; it has {list(targets_M.shape)}")
    return targets_M if rules.multilabel else targets_M.long()


def _steps(items: Iterable[LoaderItem]) -> int:
    return len(items) if isinstance(items, Sized) else 0


def _num_samples(items: Iterable[LoaderItem]) -> int:
    dataset = getattr(items, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else 0


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
