"""One name of `report.record`: what it sees of an epoch, and what it keeps of it."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fastkd.training.config import RecordName
from fastkd.training.step import Prepared

__all__ = ["LAST_STEPS", "Arrays", "Recording", "Row"]

LAST_STEPS = 4
"""Steps at the end of an epoch that recordings see. A run that is resumed there sees fewer, but
at least one: nothing of them has to be saved."""

Row = dict[str, Any]
"""Of record/NAME.jsonl; `epoch` is added."""
Arrays = Mapping[str, np.ndarray]
"""Of record/NAME-epochNNNN.npz."""


class Recording:
    """Sees the last steps of every epoch; on all ranks, of which rank 0 writes.

    Nothing here may change weights, buffers or random numbers of the training.
    """

    name: ClassVar[RecordName]
    in_arrays: ClassVar[bool] = False
    """Whether `of_epoch` returns arrays instead of a row."""

    def before_training(self) -> Row | None:
        """The row of epoch 0, if there is one."""
        return None

    def before_update(self, prepared: Prepared) -> None:
        """One of the last steps, as it is given to `Update`."""

    def of_epoch(self, epoch: int, last: Prepared, wait_ms: float) -> Row | Arrays | None:
        """What is kept of an epoch, counted from 1; None: nothing.

        last: what its last step was given. wait_ms: for data, per step of the epoch.
        """
        raise NotImplementedError
