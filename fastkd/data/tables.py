"""The draws of an epoch on the device: one transfer per epoch, none per batch."""

import numpy as np
import torch
from torch import Tensor

from fastkd.data.draws import MIRROR, SHIFT_LEFT, SHIFT_TOP, integer_table
from fastkd.data.geometry import NO_GEOMETRY, Geometry, gather_crops, pad_images

__all__ = ["GeometryTables", "to_device"]

_Tables = tuple[Tensor | None, Tensor | None, Tensor | None]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A numpy array copied to the device without making the host wait."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class GeometryTables:
    """Corner and flip of every sample id in a given epoch; caches the last epoch.

    A sample that is shown several times in an epoch has a corner and a flip for each appearance;
    appearance 0 is x.
    """

    def __init__(
        self, geometry: Geometry, seed: int, num_samples: int, device: torch.device
    ) -> None:
        self._geometry = geometry
        self._seed = seed
        self._num_samples = num_samples
        self._device = device
        self._epoch: int | None = None
        self._tables: dict[int, _Tables] = {}

    def of(self, epoch: int, index_B: Tensor, appearance: int = 0) -> _Tables:
        """(top, left, flip) of some samples: int64, int64, bool; None if nothing varies."""
        if epoch != self._epoch:
            self._tables = {}
            self._epoch = epoch
        if appearance not in self._tables:
            self._tables[appearance] = self._draw(epoch, appearance)
        top, left, flip = (
            None if table is None else table.index_select(0, index_B)
            for table in self._tables[appearance]
        )
        return top, left, flip

    def crop(
        self, pictures_BHWC: Tensor, index_B: Tensor, epoch: int, appearance: int = 0
    ) -> Tensor:
        """The pictures of these samples, padded, cropped and flipped as drawn; uint8 as well."""
        if self._geometry == NO_GEOMETRY:
            return pictures_BHWC
        return gather_crops(
            pad_images(pictures_BHWC, self._geometry),
            torch.arange(len(pictures_BHWC), device=pictures_BHWC.device),
            *self.of(epoch, index_B, appearance),
            (pictures_BHWC.shape[1], pictures_BHWC.shape[2]),
        )

    def _draw(self, epoch: int, appearance: int) -> _Tables:
        def table(stream: int, high: int) -> Tensor:
            draws_N = integer_table(self._seed, epoch, stream, self._num_samples, high, appearance)
            return to_device(draws_N, self._device)

        padding = self._geometry.padding
        return (
            table(SHIFT_TOP, 2 * padding + 1) if padding else None,
            table(SHIFT_LEFT, 2 * padding + 1) if padding else None,
            table(MIRROR, 2).bool() if self._geometry.flip else None,
        )
