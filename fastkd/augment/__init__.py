"""Views of a batch: x is what the loader yields, x' is made from it here.

Teacher and student see the same pixels of a view by construction.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastkd.augment.mix import draw_mix, mix_images
from fastkd.data.batch import Batch

__all__ = ["PartnerSource", "ViewMaker"]


class PartnerSource(Protocol):
    """What x' needs of a loader: the whole global batch of a step, not only this rank's part."""

    def global_size(self, step: int) -> int:
        """Samples in the global batch of a step."""
        ...

    def global_index(self, epoch: int, step: int) -> np.ndarray:
        """Their sample ids, int64."""
        ...

    def rank_part(self, step: int) -> slice:
        """Where this rank's part lies within that batch."""
        ...

    def fetch(self, index_N: Tensor, epoch: int) -> Tensor:
        """Augmented images of any samples, as they look in that epoch."""
        ...


class ViewMaker:
    """Batch -> views by name."""

    def __init__(
        self,
        xprime: str,
        *,
        seed: int,
        loader: PartnerSource,
        world_size: int,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        self.xprime = xprime
        self.seed = seed
        self.loader = loader
        self.world_size = world_size
        self.layout = layout

    def __call__(self, batch: Batch, epoch: int, step: int) -> dict[str, Tensor]:
        """`x`, and `xprime` where the recipe has one."""
        x = batch.images_NCHW.contiguous(memory_format=self.layout)
        if self.xprime == "none":
            return {"x": x}
        draw = draw_mix(
            self.xprime,
            seed=self.seed,
            epoch=epoch,
            step=step,
            num=self.loader.global_size(step),
            side=x.shape[-1],
        )
        return {
            "x": x,
            "xprime": mix_images(x, self._partners(x, draw.partner_N, epoch, step), draw),
        }

    def _partners(self, x: Tensor, partner_N: np.ndarray, epoch: int, step: int) -> Tensor:
        if self.world_size == 1:
            return x[torch.from_numpy(partner_N).to(x.device)]
        # A partner may live on another rank; its pixels follow from its id and the epoch alone.
        index = self.loader.global_index(epoch, step)
        mine = index[partner_N][self.loader.rank_part(step)]
        return self.loader.fetch(torch.from_numpy(mine), epoch)
