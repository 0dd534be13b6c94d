"""The batch that every loader yields, and what the trainer expects from a loader.

Flow: sources -> loader -> Batch -> augment -> teacher / student.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from fastkd.data.picture_views import PictureView

__all__ = ["IGNORED", "NO_LABEL", "Batch", "LabelKind", "Loader", "TrainLoader"]

LabelKind = Literal["class", "multi", "pixel"]
"""What is labelled: an image by one class [N], by several [N, C], or its pixels one by one
[N, H, W]."""

IGNORED = -1.0
"""In labels [N, C]: unknown; ignored by all losses and metrics."""
NO_LABEL = -100
"""In class ids [N] or [N, H, W], as in torch: unknown; ignored by metrics, by KD on x and by CE."""


class Batch(NamedTuple):
    """One rank's part of one global batch, on the training device."""

    images_NCHW: Tensor
    """Floating, normalised, channels-last in memory unless the loader is set otherwise."""
    labels_N: Tensor
    """int64 class ids; for images with several labels float32 [N, C]: 1 where a class is present, 0
    where it is absent, IGNORED where that is unknown. Of a user's loader, and where x is mixed,
    also rows of probabilities of the classes, float32 [N, C], if every loss that reads labels
    takes them. Where pixels are labelled int64 [N, H, W], the class of each."""
    index_N: Tensor
    """int64 stable sample ids: the position in the source's canonical order, the same in every
    epoch and on every rank (memory banks and teacher caches are keyed by it)."""
    global_size: int = 0
    """Samples of all ranks together; 0 if not counted, in an evaluation on users' loaders."""
    second_NCHW: Tensor | None = None
    """Second views of the pictures of x, by a loader opened by `with_views`: k images for each of
    x, all first ones, then all second ones, and so on."""
    unread: tuple[tuple[int, str], ...] = ()
    """(sample id, reason) of the planned images that cannot be read: with data.on_bad=skip another
    one is shown in its row or, in evaluation, a black one without a label."""


class TrainLoader(Protocol):
    """What the training loop needs from any loader, including a user's own."""

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch; in evaluation a rank may yield one batch less."""
        ...

    @property
    def batch_rows(self) -> tuple[int, ...]:
        """Images of a batch on the rank that has fewest of it: of a full batch, and of the last
        one of an epoch if that is smaller. () if nobody knows."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step, start_step + 1, ... of an epoch; earlier ones are never touched.

        Epochs may come in any order, and again (`augment.cycle`): each is a function of its number.
        """
        ...

    def with_views(self, views: PictureView) -> "TrainLoader":
        """A loader of the same batches that also yields second views of their pictures.

        Raises:
            UserError: this loader has no pictures to make second views of.
        """
        ...

    @property
    def is_planned(self) -> bool:
        """Whether the ranks' batches are parts of one that follows from (seed, epoch, step)."""
        ...


class Loader(TrainLoader, Protocol):
    """A loader from one of fastkd's data backends.

    The global batch `s` of an epoch is a function of (seed, epoch, s) only. Rank r of R yields the
    r-th of R contiguous parts of it, their sizes differing by at most one.
    """

    @property
    def num_samples(self) -> int:
        """Samples in the split, over all ranks."""
        ...

    @property
    def labels_N(self) -> Tensor:
        """Labels by sample id, on the CPU, in the form of `Batch.labels_N`."""
        ...

    def part(self, step: int) -> slice:
        """This rank's places of a step in the order of every epoch; possibly none."""
        ...
