"""Adapts users' own loaders, as passed to `fastkd.distill`, to the trainer's protocol.

Their shuffling and augmentation follow from (seed, epoch, step, rank), so that a resumed run sees
what an uninterrupted one would have seen. The price: batches before the step are drawn again.
"""

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, TensorDataset, default_collate

from fastkd.compute.collectives import on_any_rank, on_ranks
from fastkd.compute.placement import Placement
from fastkd.compute.ranks import World
from fastkd.data.batch import NO_LABEL, Batch, LabelKind
from fastkd.data.facts import Facts
from fastkd.data.loaders.items import item_of, naming
from fastkd.data.loaders.label_rules import LabelRules, LabelUse, kind_on_ranks, unlike
from fastkd.data.loaders.map_rules import pixel_counter
from fastkd.data.loaders.readable import (
    BEST,
    ONCE,
    LoaderItem,
    Shown,
    check_loader,
    images_per_epoch,
    layout_of,
    num_samples,
    num_steps,
    peek,
)
from fastkd.data.loaders.workers import from_workers
from fastkd.data.picture_views import PictureView
from fastkd.errors import RunFailed, UserError

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

_EQUAL = "give the loader a torch DistributedSampler, which makes them equal"

_UNEVEN = f"the processes have different numbers of batches in an epoch: {_EQUAL}"

_LAST = -1
"""Sent in place of a number of images by a rank whose loader has ended."""


class ForeignLoader:
    """The user's loader, one per rank, with this rank's share of the images.

    train: False for evaluation, where the ranks' batches may differ.
    Labels are in the form of `LabelRules.of`.
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
        self.layout = layout_of(placement.channels_last)
        self.seed = seed
        self.rules = rules or LabelRules()
        self.train = train
        self.name = "train_loader" if train else "val_loader"
        self.steps_per_epoch = num_steps(items)
        self.labels_N = _labels_by_id(items, self.rules)
        """Labels by sample id if a loss needs ids, then compared with every batch; else zeros."""
        self._compared = False
        with naming(self.name):
            rows = _planned_rows(items)
        self.batch_rows = rows
        """As a DataLoader plans them, or as a list has them; in a training those of the rank with
        the least: all ranks must try a step on the same."""
        # Sizes are compared on the host: NCCL would wait for the device.
        shared = train and self.world.size > 1
        if shared:
            of_ranks = on_ranks(self.batch_rows, self.world)
            self.batch_rows = min(of_ranks, key=lambda rows: (min(rows, default=0), rows))
        self._ranks: Any = dist.new_group(backend="gloo") if shared else None
        lengths = self._of_ranks(self.steps_per_epoch)
        if len(set(lengths)) > 1:
            raise UserError(
                f"the processes have loaders of different lengths ({lengths} batches): {_EQUAL}"
            )

    @property
    def is_planned(self) -> bool:
        """Each rank's batches are its own, and it mixes its own images."""
        return False

    def with_views(self, views: PictureView) -> Self:
        """UserError: there are no pictures."""
        raise UserError(
            f"xprime={views.kind!r} is made of the pictures as they are stored, and a loader "
            f"of your own gives normalised images: choose cutmix, mixup or cutout, or run a "
            f"recipe on the image files, such as `fastkd train folder data.root=FOLDER`"
        )

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
        items = from_workers(iter(self.items), "num_workers")
        known = torch.zeros((), dtype=torch.bool)
        for step in range(self.steps_per_epoch):
            torch.manual_seed(seed << 32 | step)
            item = next(items, None)
            if item is None:
                self._end(step, epoch)
                break
            batch, seen = self._batch(item, share=step >= start_step)
            known = known.to(seen.device) | seen
            if batch is not None:
                yield batch
        if self.train and self.rules.needed and not any(self._of_ranks(int(known))):
            raise RunFailed(
                f"nothing was learned in epoch {epoch + 1}: none of its images has a label, and "
                f"every loss of this run reads labels ({self.rules.needed} for one). Give labels, "
                f"or a loss that does without, such as KD(ce_weight=0)"
            )

    def _batch(self, item: LoaderItem, *, share: bool) -> tuple[Batch | None, Tensor]:
        """The batch on the device, None if it is not to be shared; whether it has any label."""
        with naming(self.name):
            images, raw, ids = item_of(item)
            labels = self.rules.of(raw, images)
        seen = self.rules.any_known(labels)
        if not share:
            return None, seen
        # The networks and the mixes of images want fp32; a loader of numpy arrays gives fp64.
        images = images.to(self.device, torch.float32, non_blocking=True, memory_format=self.layout)
        if self.rules.wants_ids and ids is None:
            raise UserError(
                f"the loss {self.rules.wants_ids} keeps state per sample: make the training "
                f"loader yield (images, labels, sample ids)"
            )
        if self.rules.wants_ids:
            self._check_ids(ids, labels)
        elif not _are_ids(ids, len(images)):
            # Whatever comes third, such as paths; no loss asks for it.
            ids = torch.full((len(images),), -1, device=self.device)
        ids = ids.to(self.device, non_blocking=True)
        size = self._global_size(len(images))
        labels = labels.to(self.device, non_blocking=True)
        return Batch(images, labels, ids, size), seen

    def _end(self, drawn: int, epoch: int) -> None:
        """UserError if the loader has ended before its first batch, or only on this rank."""
        sizes = self._of_ranks(_LAST)
        if len(set(sizes)) > 1:
            raise UserError(_UNEVEN)
        if not drawn and self.train:
            raise UserError(
                f"train_loader yields nothing in epoch {epoch + 1}: it {ONCE}. Its __iter__ must "
                f"begin anew: {BEST}"
            )

    def _of_ranks(self, number: int) -> list[int]:
        """This number on every rank."""
        if self._ranks is None:
            return [number]
        numbers = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world.size)]
        dist.all_gather(numbers, torch.tensor([number]), group=self._ranks)
        return [int(one) for one in numbers]

    def _global_size(self, num: int) -> int:
        """Size of the global batch, given `num` images on this rank; 0 in an evaluation.

        Raises:
            UserError: the ranks have batches of different sizes, which cannot be averaged.
        """
        if not self.train:
            return 0
        found = self._of_ranks(num)
        if _LAST in found:
            raise UserError(_UNEVEN)
        if min(found) != max(found):
            raise UserError(f"the processes have batches of different sizes ({found}): {_EQUAL}")
        return sum(found)

    def _check_ids(self, ids: Any, labels: Tensor) -> None:
        """UserError for ids without a sample, and for labels that differ from the loss's record."""
        if not _are_ids(ids, len(labels)):
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


def _planned_rows(items: Iterable[LoaderItem]) -> tuple[int, ...]:
    if isinstance(items, list | tuple):
        rows = {len(item_of(item).images_NCHW) for item in items}
        return tuple(sorted(rows, reverse=True))
    sampler = items.batch_sampler if isinstance(items, DataLoader) else None
    if type(sampler) is not BatchSampler or not isinstance(sampler.sampler, Sized):
        return ()
    num, size = len(sampler.sampler), sampler.batch_size
    rest = 0 if sampler.drop_last else num % size
    return tuple(rows for rows in (size if num >= size else 0, rest) if rows)


def _are_ids(ids: Any, num: int) -> bool:
    return (
        isinstance(ids, Tensor)
        and ids.shape == (num,)
        and not ids.is_floating_point()
        and not ids.is_complex()
    )


@dataclass(frozen=True)
class ForeignPair:
    """Both of the user's loaders, and what networks and losses must know about them."""

    train: ForeignLoader
    val: ForeignLoader | None
    """None without labels to evaluate on."""
    facts: Facts


def open_foreign(
    train_items: Iterable[LoaderItem],
    val_items: Iterable[LoaderItem] | None,
    shown: Shown,
    use: LabelUse,
    *,
    kind: LabelKind,
    num_classes: int,
    seed: int,
    placement: Placement,
) -> ForeignPair:
    """Both loaders in the trainer's protocol.

    shown: the first batch of training. kind: of its labels, on all ranks.

    Raises:
        UserError: labels that the losses or the evaluation cannot use, as the first batches show
            them; no validation image has a label; a loss wants sample ids and the data set does not
            say its labels.
    """
    if use.reads and shown.labels is None:
        raise UserError(
            f"train_loader yields images alone, and the loss {use.reads} reads labels: yield "
            f"(images, labels), or use a loss that does without, such as KD(ce_weight=0)"
        )
    judged = None if val_items is None else peek("val_loader", val_items, placement).labels
    if judged is not None:
        measured = kind_on_ranks(judged, use, num_classes, placement.world, measured=True)
        if use.reads and measured != kind:
            raise unlike(kind, measured)
        # Without a loss that reads labels, those of validation say what is measured.
        kind = measured
    rules = LabelRules(
        kind=kind,
        num_classes=num_classes,
        read=use.reads is not None,
        needed=use.needed,
        soft=use.soft,
        wants_ids=use.ids,
        wants_classes=use.classes,
    )
    first = _checked("train_loader", shown, rules)
    _check_stored("train_loader", train_items, rules)
    val_rules = LabelRules(kind=kind, num_classes=num_classes, nearest=True)
    train = ForeignLoader(train_items, placement, seed, rules)
    val = None
    if val_items is not None and judged is not None:
        _check_stored("val_loader", val_items, val_rules)
        _check_validation(val_items, val_rules, placement.world)
        val = ForeignLoader(val_items, placement, seed, val_rules, train=False)
    pixels = kind == "pixel"
    facts = Facts(
        image_shape=shown.image_shape,
        num_classes=num_classes,
        labels_N=train.labels_N,
        label_kind=kind,
        normalization=((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        labelled=on_any_rank(bool(rules.any_known(first)), placement.world),
        label_size=(first.shape[1], first.shape[2]) if pixels else None,
        count_pixels=pixel_counter(train_items, num_classes, placement.world) if pixels else None,
    )
    return ForeignPair(train, val, facts)


def _checked(name: str, shown: Shown, rules: LabelRules) -> Tensor:
    """The labels of a first batch, checked on the host wherever they are."""
    labels = shown.labels.cpu() if isinstance(shown.labels, Tensor) else shown.labels
    with naming(name):
        return rules.of(labels, shown.images_NCHW)


def _check_stored(name: str, items: Iterable[LoaderItem], rules: LabelRules) -> None:
    """UserError for labels that cannot be used, where all can be read at once, without images."""
    if isinstance(items, list | tuple):
        for item in items:
            with naming(name):
                images, labels, _ = item_of(item)
            _checked(name, Shown(images, labels), rules)
    dataset = getattr(items, "dataset", None)
    # Not of a subclass, which may yield something else.
    if type(dataset) is not TensorDataset or len(dataset.tensors) < 2:
        return
    if getattr(items, "collate_fn", None) is default_collate:
        images, labels, *_ = dataset.tensors
        _checked(name, Shown(images, labels), rules)


def _check_validation(items: Iterable[LoaderItem], rules: LabelRules, world: World) -> None:
    """UserError if no validation image of any rank has a label; reads on until one has."""
    found = False
    for item in from_workers(items, "num_workers"):
        with naming("val_loader"):
            images, labels, _ = item_of(item)
        known = _checked("val_loader", Shown(images, labels), rules)
        found = bool((known == 1).any() if known.dim() == 2 else rules.any_known(known))
        if found:
            break
    if not on_any_rank(found, world):
        none = "no positive label" if rules.kind == "multi" else "no label (all are -100)"
        raise UserError(
            f"the images of val_loader have {none}, so nothing can be measured on them: give "
            f"labels, or val_loader=None, which measures nothing and keeps the last epoch"
        )


def _labels_by_id(items: Iterable[LoaderItem], rules: LabelRules) -> Tensor:
    """The data set's `targets` if a loss needs ids; UserError if they are not labels.

    Zeros if no loss does: a data set's `targets` can be anything; in torchvision's VOC they
    are file names. NO_LABEL where pixels are labelled: label maps stay with the loader.
    """
    if rules.wants_ids is None or rules.kind == "pixel":
        none = NO_LABEL if rules.kind == "pixel" else 0
        return torch.full((num_samples(items),), none)
    wanted = (
        f"the loss {rules.wants_ids} needs the label of every training sample: give the "
        f"loader's dataset an attribute `targets`, a list of labels by sample id"
    )
    targets = getattr(getattr(items, "dataset", None), "targets", None)
    if targets is None:
        raise UserError(wanted)
    try:
        targets_M = torch.as_tensor(targets).cpu()
        if targets_M.dim() == 1 + (rules.kind == "multi"):
            return replace(rules, read=True).of(targets_M, targets_M)
    except (TypeError, ValueError, RuntimeError) as error:
        # A UserError is a ValueError too.
        raise UserError(f"{wanted}; in what it has, {error}") from None
    raise UserError(f"{wanted} as it yields them; it has {list(targets_M.shape)}")
