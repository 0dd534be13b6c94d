"""Loaders of the user's own, as `fastkd.distill` takes them, in the protocol of the trainer.

What they shuffle and augment follows from (seed, epoch, step, rank), so that a resumed run sees
what an unbroken one would have seen; the price is that batches before the step are drawn again.
"""

from collections.abc import Iterable, Iterator, Sized
from typing import Any

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

from fastkd.compute.ranks import World
from fastkd.data.batch import NO_LABEL, Batch
from fastkd.errors import UserError

__all__ = ["ForeignLoader", "LoaderItem", "check_loader", "images_per_epoch"]

LoaderItem = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


class ForeignLoader:
    """The user's loader; one for each rank, with this rank's share of the images.

    wants_ids: name of a loss that cannot do without sample ids.
    Labels are class ids [N], or [N, C] where images have several (then float32: 1, 0, -1 unknown).
    """

    def __init__(
        self,
        items: Iterable[LoaderItem],
        world: World,
        seed: int,
        channels_last: bool,
        wants_ids: str | None = None,
    ) -> None:
        self.items, self.world, self.device, self.seed = items, world, world.device, seed
        self.wants_ids = wants_ids
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.steps_per_epoch = len(items) if isinstance(items, Sized) else 0
        dataset = getattr(items, "dataset", None)
        self.num_samples = len(dataset) if isinstance(dataset, Sized) else 0
        self.multilabel: bool | None = None
        """Which of the two is expected; None: either."""
        self.num_classes: int | None = None
        """Of class ids, which are then checked where they come from the host."""
        self.needs_labels: str | None = None
        """A loss that cannot do with images of unknown class."""
        self._targets_M: Tensor | None = None
        self._compared = False
        self.batch_size = 0
        """Of the batch that was yielded last, on this rank."""
        # Sizes are compared on the host: through NCCL they would wait for the device.
        self._ranks: Any = dist.new_group(backend="gloo") if world.size > 1 else None

    def first(self) -> tuple[Tensor, Tensor]:
        """One image [1, C, H, W] and its label, on the device; UserError where there is none."""
        item = next(iter(self.items), None)
        if item is None:
            raise UserError("a loader yields nothing: its first batch is missing")
        images, labels, _ = self._parts(item)
        self.batch_size = len(labels)
        return images[:1], labels[:1]

    def labels_by_id(self) -> Tensor:
        """The data set's `targets` where a loss wants ids, then also compared with every batch.

        Zeros where none does: what a data set calls its targets may be anything, in torchvision's
        VOC they are file names. UserError where they are no labels.
        """
        if self.wants_ids is None:
            return torch.zeros(self.num_samples, dtype=torch.int64)
        wanted = (
            f"the loss {self.wants_ids} needs the label of every training sample: give the "
            f"loader's dataset an attribute `targets`, a list of labels by sample id"
        )
        targets = getattr(getattr(self.items, "dataset", None), "targets", None)
        if targets is None:
            raise UserError(wanted)
        try:
            targets_M = torch.as_tensor(targets).cpu()
            self._check_labels(targets_M)
        except (TypeError, ValueError, RuntimeError, UserError) as error:
            raise UserError(f"{wanted}; in what it has, {error}") from None
        if targets_M.dim() != 1 + bool(self.multilabel):
            raise UserError(f"{wanted} as it yields them; it has {list(targets_M.shape)}")
        self._targets_M = targets_M if self.multilabel else targets_M.long()
        return self._targets_M

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches on the device; those before `start_step` are drawn and thrown away."""
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
            images, labels, ids = self._parts(item)
            if self.wants_ids and ids is None:
                raise UserError(
                    f"the loss {self.wants_ids} keeps state per sample: make the training loader "
                    f"yield (images, labels, sample ids)"
                )
            if self.wants_ids:
                self._check_ids(ids, item[1])
            self.batch_size = len(labels)
            if ids is None:
                ids = torch.full((len(labels),), -1, device=self.device)
            yield Batch(images, labels, ids.to(self.device, non_blocking=True))

    def global_size(self, step: int) -> int:
        """Of the batch that was yielded last, over all ranks.

        Raises:
            UserError: the ranks have batches of different sizes, over which they could not average.
        """
        if self._ranks is None:
            return self.batch_size
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world.size)]
        dist.all_gather(sizes, torch.tensor([self.batch_size]), group=self._ranks)
        found = [int(size) for size in sizes]
        if min(found) != max(found):
            raise UserError(
                f"the processes have batches of different sizes ({found}); give the loader a "
                f"torch DistributedSampler, which makes them equal"
            )
        return sum(found)

    def _parts(self, item: Any) -> tuple[Tensor, Tensor, Tensor | None]:
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
                f"them, got {what}"
            )
        images = images.to(self.device, non_blocking=True, memory_format=self.layout)
        self._check_labels(labels)
        multilabel = labels.dim() == 2
        if self.multilabel not in (None, multilabel):
            kinds = {True: "[N, classes], several per image", False: "[N], one class id per image"}
            raise UserError(
                f"this loader gives labels {kinds[multilabel]}, another one of this run gives "
                f"{kinds[not multilabel]}: make them alike"
            )
        dtype = torch.float32 if multilabel else torch.int64
        labels = labels.to(self.device, dtype, non_blocking=True)
        return images, labels, ids[0] if ids else None

    def _check_ids(self, ids: Any, labels: Tensor) -> None:
        """UserError for ids of no sample, and for a label that is not the one the loss knows."""
        if not isinstance(ids, Tensor) or ids.shape != labels.shape[:1] or ids.is_floating_point():
            got = f"{list(ids.shape)} of {ids.dtype}" if isinstance(ids, Tensor) else type(ids)
            raise UserError(f"sample ids must be whole numbers [N], one per image; got {got}")
        on_host = ids.device.type == labels.device.type == "cpu"
        # What is on a GPU already is waited for once, not in every step.
        if self._targets_M is None or (self._compared and not on_host):
            return
        self._compared = True
        ids_N, labels_N, num = ids.cpu().long(), labels.cpu(), len(self._targets_M)
        wrong_N = (ids_N < 0) | (ids_N >= num)
        if wrong_N.any():
            raise UserError(
                f"the loss {self.wants_ids} keeps state for {num} samples, as many as the loader's "
                f"dataset has `targets`, but a batch has the sample id {int(ids_N[wrong_N][0])}: "
                f"yield as id the position of the image in `targets`"
            )
        known_N = self._targets_M[ids_N]
        wrong_N = (known_N != labels_N).view(len(ids_N), -1).any(1)
        if wrong_N.any():
            raise UserError(
                f"the sample {int(ids_N[wrong_N][0])} comes with the label "
                f"{labels_N[wrong_N][0].tolist()}, but the dataset's `targets`, by which the loss "
                f"{self.wants_ids} goes, say {known_N[wrong_N][0].tolist()}: make `targets` and "
                f"the ids what the loader yields (a target_transform changes only the labels)"
            )

    def _check_labels(self, labels: Any) -> None:
        wanted = "labels must be class ids [N], whole numbers, or [N, classes] of 1, 0 and -1"
        if not isinstance(labels, Tensor):
            raise UserError(f"{wanted}; got {type(labels).__name__}: make it a tensor")
        if labels.dim() not in (1, 2) or (labels.dim() == 1 and labels.is_floating_point()):
            raise UserError(f"{wanted}; got {list(labels.shape)} of {labels.dtype}")
        # On the device it would be waited for.
        if self.num_classes is None or labels.dim() == 2 or labels.device.type != "cpu":
            return
        labels = labels.long()  # 260 is 4 to a uint8
        unlabelled = labels == NO_LABEL
        if self.needs_labels and unlabelled.any():
            raise UserError(
                f"the loss {self.needs_labels} needs the class of every image, and some are "
                f"labelled {NO_LABEL} (none): take them away, or use KD or CrossEntropy"
            )
        wrong = labels[((labels < 0) | (labels >= self.num_classes)) & ~unlabelled]
        if wrong.numel():
            raise UserError(
                f"the label {int(wrong[0])} is no class of a network with {self.num_classes}, "
                f"numbered from 0 (and {NO_LABEL}: none): build it with more classes, or renumber"
            )


def images_per_epoch(items: Iterable[LoaderItem], batch_size: int) -> int:
    """As the data set counts them; for a loader without one, full batches of `batch_size`."""
    dataset = getattr(items, "dataset", None)
    if isinstance(dataset, Sized) and len(dataset):
        return len(dataset)
    return len(items) * batch_size if isinstance(items, Sized) else 0


def check_loader(
    name: str, loader: Iterable[LoaderItem], world: World, *, exact: bool = False
) -> None:
    """UserError for a loader that has no length, can be read only once, or is not shared out.

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
    # Beside a batch sampler, which may well share out, a DataLoader has a sampler it does not ask.
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
