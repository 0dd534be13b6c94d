"""Checks the labels of users' loaders and brings them to one form, so that no loss silently trains
on nonsense.

Class ids int64 [N] (-100: none), rows of probabilities float32 [N, C] where the losses take them,
or several labels per image, float32 [N, C] of 0, 1 and -1.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastkd.compute.collectives import on_any_rank
from fastkd.compute.ranks import World
from fastkd.data.batch import IGNORED, NO_LABEL
from fastkd.errors import UserError

__all__ = [
    "LabelKind",
    "LabelRules",
    "LabelUse",
    "are_distributions",
    "kind_on_ranks",
    "unlike",
]

LabelKind = Literal["class", "multi"]
"""One class per image, as an id or a row of probabilities; or several labels per image, [N, C]."""

WANTED = "labels must be class ids [N], whole numbers, or [N, classes] of 1, 0 and -1"


@dataclass(frozen=True)
class LabelUse:
    """What the losses of a run do with the training labels."""

    reads: str | None = None
    """A loss that reads them."""
    multi: bool = False
    """Whether one reads several labels per image."""
    soft: bool = True
    """Whether all that read classes also take rows of probabilities."""
    needed: str | None = None
    """A loss that reads them, if every loss does."""
    ids: str | None = None
    """A loss that needs sample ids."""
    classes: str | None = None
    """A loss that accepts no image of unknown class."""


def unlike(kind: LabelKind) -> UserError:
    """The message for a loader with labels of this kind, where the run has the other one."""
    kinds = {"multi": "[N, classes], several per image", "class": "[N], one class id per image"}
    other = kinds["class" if kind == "multi" else "multi"]
    return UserError(
        f"this loader gives labels {kinds[kind]}, another one of this run gives {other}: make them "
        f"alike"
    )


def kind_on_ranks(labels: Any, use: LabelUse, num_classes: int, world: World) -> LabelKind:
    """The kind of a loader's labels, as the first batches of all ranks show it.

    Several per image if any rank says so: rows that happen to sum to 1 can be either. All ranks
    must call this.
    """
    return "multi" if on_any_rank(_several(labels, use, num_classes), world) else "class"


def _several(labels: Any, use: LabelUse, num_classes: int) -> bool:
    if not isinstance(labels, Tensor) or labels.dim() != 2 or _is_column(labels, num_classes):
        return False
    # To a loss on several labels per image, rows are such labels whatever they sum to.
    return use.multi or not bool(are_distributions(labels).all())


@dataclass(frozen=True)
class LabelRules:
    """What the labels of a run must be."""

    kind: LabelKind = "class"
    num_classes: int | None = None
    """Class ids are checked against it if they are on the host; None: no check."""
    read: bool = True
    """Whether anything reads them. If nothing does, labels of another form count as none."""
    needed: str | None = None
    """A loss that reads labels, if all of the run do: an epoch without a label has failed."""
    soft: bool = False
    """Whether rows of probabilities stay rows; else they must be one-hot, and become ids."""
    nearest: bool = False
    """Whether the most probable class of such a row is its label, as in an evaluation."""
    wants_ids: str | None = None
    """A loss that requires sample ids."""
    wants_classes: str | None = None
    """A loss that does not accept images of unknown class."""

    def of(self, labels: Any, num: int) -> Tensor:
        """The labels of `num` images in the form of this run, on their own device.

        Raises:
            UserError: they are not labels, or not of this run's kind.
        """
        if labels is None:
            return torch.full((num,), NO_LABEL)
        if self.read:
            return self._checked(labels, num)
        try:
            return self._checked(labels, num)
        except UserError:
            return torch.full((num,), NO_LABEL)

    def any_known(self, labels: Tensor) -> Tensor:
        """Whether one of these labels, from `of`, says something; 0-dim bool."""
        if labels.dim() == 1:
            return (labels != NO_LABEL).any()
        return (labels != IGNORED).any()

    def _checked(self, labels: Any, num: int) -> Tensor:
        if not isinstance(labels, Tensor):
            raise UserError(f"{WANTED}; got {type(labels).__name__}: make it a tensor")
        labels = labels.as_subclass(Tensor)
        got = f"got {list(labels.shape)} of {labels.dtype}"
        if labels.dim() and len(labels) != num:
            raise UserError(f"{WANTED}; {got}, for {num} images")
        if _is_column(labels, self.num_classes):
            if labels.is_floating_point():
                raise UserError(f"{WANTED}; {got}: class ids are labels.squeeze(1).long()")
            labels = labels.squeeze(1)
        if labels.dim() not in (1, 2) or labels.is_complex():
            raise UserError(f"{WANTED}; {got}")
        if labels.dim() == 1:
            return self._checked_ids(labels, got)
        if self.num_classes not in (None, labels.shape[1]):
            raise UserError(
                f"the labels are [N, {labels.shape[1]}], one column per class, but the student "
                f"gives {self.num_classes} logits: build it with num_classes={labels.shape[1]}. "
                f"Class ids, one per image, are labels [N]"
            )
        return self._checked_rows(labels)

    def _checked_ids(self, labels: Tensor, got: str) -> Tensor:
        if labels.is_floating_point():
            raise UserError(f"{WANTED}; {got}: class ids are labels.long()")
        if self.kind == "multi":
            raise unlike("class")
        labels = labels.long()  # 260 is 4 to a uint8
        # On the device the checks would wait.
        if self.num_classes is None or labels.device.type != "cpu":
            return labels
        unlabelled = labels == NO_LABEL
        if self.wants_classes and unlabelled.any():
            raise UserError(
                f"the loss {self.wants_classes} needs the class of every image, and some are "
                f"labelled {NO_LABEL} (none): remove them, or use losses that do without: "
                f"KD(ce_weight=0), and CrossEntropy(weight=0.1) for the images that have one"
            )
        wrong = labels[((labels < 0) | (labels >= self.num_classes)) & ~unlabelled]
        if wrong.numel():
            raise UserError(
                f"the label {int(wrong[0])} is not a class of a network with {self.num_classes}, "
                f"numbered from 0 (and {NO_LABEL}: none): build it with more classes, or renumber"
            )
        return labels

    def _checked_rows(self, labels: Tensor) -> Tensor:
        rows_NC = labels.float()
        on_host = labels.device.type == "cpu"
        if self.kind == "multi":
            fits_NC = (rows_NC >= 0) & (rows_NC <= 1)
            if self.nearest:
                fits_NC = (rows_NC == 0) | (rows_NC == 1)
            wrong = rows_NC[~(fits_NC | (rows_NC == IGNORED))]
            if on_host and wrong.numel():
                raise UserError(
                    f"{WANTED}; one of them is {wrong[0].item():g}: several labels per image are "
                    f"1, 0 and -1 (unknown)"
                )
            return rows_NC
        if on_host and not bool(are_distributions(rows_NC).all()):
            wrong = rows_NC[~are_distributions(rows_NC)][0]
            raise UserError(
                f"{WANTED}, or rows of probabilities; a row sums to {wrong.sum().item():g}, its "
                f"least value is {wrong.min().item():g}: this run reads one class per image, so "
                f"each row must sum to 1"
            )
        if self.soft:
            return rows_NC
        if on_host and not self.nearest and not bool((rows_NC.amax(1) == 1).all()):
            raise UserError(
                "the losses of this run need one class per image, and a row of the labels has "
                "several: MixUp and CutMix make such labels; give class ids, or use KD and "
                "CrossEntropy, which take both"
            )
        return rows_NC.argmax(1)


def _is_column(labels: Tensor, num_classes: int | None) -> bool:
    """Class ids [N, 1], as a data frame has them."""
    return labels.dim() == 2 and labels.shape[1] == 1 and num_classes not in (None, 1)


def are_distributions(rows_NC: Tensor) -> Tensor:
    """Per row whether it is a distribution; wide enough for values rounded to bf16."""
    wide_NC = rows_NC.float()
    return (wide_NC >= 0).all(1) & ((wide_NC.sum(1) - 1).abs() < 1e-2)
