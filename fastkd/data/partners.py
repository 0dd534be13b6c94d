"""Partners: the images that x is mixed with, possibly from another rank.

Their pixels depend on sample id and epoch alone, so a loader makes them without that rank's help.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Partners"]


@dataclass(frozen=True)
class Partners:
    """Who is mixed with whom; drawn by `fastkd.augment`, shown by the loaders."""

    draw: Callable[[int, int, int], Sequence[np.ndarray]]
    """(epoch, step, samples in the global batch) -> for x, or for each x', the partners, int64 [N]:
    sample n of the global batch is mixed with sample partner_N[n]. Empty: nothing is mixed."""
