"""Checks the labels of users' loaders and brings them to one form, so that no loss silently trains
on nonsense.

Class ids int64 [N] (-100: none), rows of probabilities float32 [N, C] where the losses take them,
several labels per image, float32 [N, C] of 0, 1 and -1, or label maps, int64 [N, H, W]
(`fastkd.data.loaders.map_rules`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.compute.collectives import on_ranks
from fastkd.compute.ranks import World
from fastkd.data.batch import IGNORED, NO_LABEL, LabelKind
from fastkd.data.loaders.map_rules import MAPS, checked_maps
from fastkd.errors import UserError

__all__ = [
    "LabelRules",
    "LabelUse",
    "are_distributions",
    "kind_on_ranks",
    "unlike",
]

WANTED = "labels must be class ids [N], whole numbers, or [N, classes] of 1, 0 and -1"
_FORMS: dict[LabelKind, str] = {
    "class": "[N], one class id per image",
    "multi": "[N, classes], several per image",
    "pixel": "[N, H, W], a class id for every pixel",
}


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


def unlike(kind: LabelKind, other: LabelKind) -> UserError:
    """The message for a loader with labels of one kind, where another one has another."""
    return UserError(
        f"this loader gives labels {_FORMS[kind]}, another one of this run gives {_FORMS[other]}: "
        f"make them alike"
    )


def kind_on_ranks(
    labels: Any,
    use: LabelUse,
    num_classes: int,
    world: World,
    *,
    dense: bool = False,
    measured: bool = False,
) -> LabelKind:
    """The kind of a loader's labels, as the first batches of all ranks show it.

    Several per image if any rank says so: rows that happen to sum to 1 can be either. All ranks
    must call this.

    dense: whether the student answers pixel by pixel, which decides where nobody reads labels.
    measured: whether the evaluation reads them.

    Raises:
        UserError: some ranks have label maps and others have not.
    """
    read = measured or use.reads is not None
    own = _kind(labels if read or not dense else None, use, num_classes, dense=dense)
    if own == "pixel" and not read and not dense:
        own = "class"  # whatever they are, nobody reads them
    found: list[LabelKind] = on_ranks(own, world)
    others: list[LabelKind] = [kind for kind in found if kind != "pixel"]
    if "pixel" in found and others:
        raise unlike(own, others[0] if own == "pixel" else "pixel")
    return "multi" if "multi" in found else own


def _kind(labels: Any, use: LabelUse, num_classes: int, *, dense: bool) -> LabelKind:
    if not isinstance(labels, Tensor):
        return "pixel" if dense else "class"
    if labels.dim() > 2:
        return "pixel" if dense or max(labels.shape[-2:]) > 1 else "class"
    if labels.dim() < 2 or _is_column(labels, num_classes):
        return "class"
    # To a loss on several labels per image, rows are such labels whatever they sum to.
    return "multi" if use.multi or not bool(are_distributions(labels).all()) else "class"


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

    def of(self, labels: Any, images_NCHW: Tensor) -> Tensor:
        """The labels of these images in the form of this run, on their own device.

        Raises:
            UserError: they are not labels, or not of this run's kind.
        """
        if labels is None:
            return self._none(images_NCHW)
        if self.read:
            return self._checked(labels, images_NCHW)
        try:
            return self._checked(labels, images_NCHW)
        except UserError:
            return self._none(images_NCHW)

    def _none(self, images_NCHW: Tensor) -> Tensor:
        num, _, *size = images_NCHW.shape
        return torch.full((num, *size) if self.kind == "pixel" else (num,), NO_LABEL)

    def any_known(self, labels: Tensor) -> Tensor:
        """Whether one of these labels, from `of`, says something; 0-dim bool."""
        return (labels != (IGNORED if labels.is_floating_point() else NO_LABEL)).any()

    def _checked(self, labels: Any, images_NCHW: Tensor) -> Tensor:
        if self.kind == "pixel" and isinstance(labels, Tensor) and labels.dim() > 2:
            return checked_maps(labels.as_subclass(Tensor), images_NCHW, self.num_classes)
        num = len(images_NCHW)
        if not isinstance(labels, Tensor):
            wanted = MAPS if self.kind == "pixel" else WANTED
            raise UserError(f"{wanted}; got {type(labels).__name__}: make it a tensor")
        labels = labels.as_subclass(Tensor)
        got = f"got {list(labels.shape)} of {labels.dtype}"
        if labels.dim() and len(labels) != num:
            raise UserError(f"{WANTED}; {got}, for {num} images")
        if self.kind == "pixel":
            raise unlike("class" if labels.dim() < 2 else "multi", "pixel")
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
            raise unlike("class", "multi")
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
