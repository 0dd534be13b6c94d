"""Views of a batch: x is what the loader yields, x' is made from it here.

Teacher and student see the same pixels of a view by construction.
"""

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fastkd.augment.mix import draw_mix, mix_images
from fastkd.data.batch import Batch
from fastkd.data.tables import to_device

__all__ = ["PartnerSource", "ViewMaker"]


@runtime_checkable
class PartnerSource(Protocol):
    """A loader that can show any sample of a global batch, also those of other ranks."""

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
    """Batch -> views by name, in one layout and dtype.

    pool: so many x' are made of the batch, one below the other, for `selection` to choose from.
    partners: where the partners for x' come from when they may lie on another rank; None takes
    them from the batch itself.
    """

    def __init__(
        self,
        xprime: str,
        *,
        seed: int,
        dtype: torch.dtype,
        layout: torch.memory_format,
        pool: int = 1,
        partners: PartnerSource | None = None,
    ) -> None:
        self.xprime = xprime
        self.seed = seed
        self.dtype = dtype
        self.layout = layout
        self.pool = pool
        self.partners = partners

    def __call__(self, batch: Batch, epoch: int, step: int) -> dict[str, Tensor]:
        """`x`, and `xprime` where the recipe has one."""
        x = self._laid_out(batch.images_NCHW)
        if self.xprime == "none":
            return {"x": x}
        mixed = [self._mixed(x, epoch, step, number) for number in range(self.pool)]
        return {"x": x, "xprime": mixed[0] if self.pool == 1 else torch.cat(mixed)}

    def _mixed(self, x: Tensor, epoch: int, step: int, number: int) -> Tensor:
        num = self.partners.global_size(step) if self.partners else len(x)
        draw = draw_mix(
            self.xprime,
            seed=self.seed,
            epoch=epoch,
            step=step,
            num=num,
            side=x.shape[-1],
            number=number,
        )
        partners = self._laid_out(self._partners(x, draw.partner_N, epoch, step))
        return mix_images(x, partners, draw)

    def _laid_out(self, images_NCHW: Tensor) -> Tensor:
        return images_NCHW.to(dtype=self.dtype, memory_format=self.layout)

    def _partners(self, x: Tensor, partner_N: np.ndarray, epoch: int, step: int) -> Tensor:
        if self.partners is None:
            return x[to_device(partner_N, x.device)]
        # A partner may live on another rank; its pixels follow from its id and the epoch alone.
        index = self.partners.global_index(epoch, step)
        mine = index[partner_N][self.partners.rank_part(step)]
        return self.partners.fetch(torch.from_numpy(mine), epoch)
