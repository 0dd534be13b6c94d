"""Checks the labels of users' loaders, so that no loss silently trains on nonsense."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastkd.data.batch import NO_LABEL
from fastkd.errors import UserError

__all__ = ["LabelRules"]


@dataclass(frozen=True)
class LabelRules:
    """What the labels of a run must be."""

    multilabel: bool | None = None
    """[N, C], several labels per image, or class ids [N]; None: either."""
    num_classes: int | None = None
    """Class ids are checked against it if they are on the host; None: no check."""
    wants_ids: str | None = None
    """A loss that requires sample ids."""
    wants_classes: str | None = None
    """A loss that does not accept images of unknown class."""

    def check(self, labels: Any) -> None:
        """UserError for values that are not labels, or not of this run's kind."""
        wanted = "labels must be class ids [N], whole numbers, or [N, classes] of 1, 0 and -1"
        if not isinstance(labels, Tensor):
            raise UserError(f"{wanted}; got {type(labels).__name__}: make it a tensor")
        if labels.dim() not in (1, 2) or (labels.dim() == 1 and labels.is_floating_point()):
            raise UserError(f"{wanted}; got {list(labels.shape)} of {labels.dtype}")
        # On the device this check would wait.
        if self.num_classes is None or labels.dim() == 2 or labels.device.type != "cpu":
            return
        labels = labels.long()  # 260 is 4 to a uint8
        unlabelled = labels == NO_LABEL
        if self.wants_classes and unlabelled.any():
            raise UserError(
                f"the loss {self.wants_classes} needs the class of every image, and some are "
                f"labelled {NO_LABEL} (none): remove them, or use KD or CrossEntropy"
            )
        wrong = labels[((labels < 0) | (labels >= self.num_classes)) & ~unlabelled]
        if wrong.numel():
            raise UserError(
                f"the label {int(wrong[0])} is no class of a network with {self.num_classes}, "
                f"numbered from 0 (and {NO_LABEL}: none): build it with more classes, or renumber"
            )
