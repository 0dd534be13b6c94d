"""Views of a batch: x is what the loader yields, x' is made from it here.

Teacher and student see the same pixels of a view by construction.
"""

import numpy as np
import torch
from torch import Tensor

from fastkd.augment.mix import draw_mix
from fastkd.data.batch import Batch, Loader
from fastkd.data.tables import to_device
from fastkd.kernels import mix as mix_images

__all__ = ["ViewMaker"]


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
        partners: Loader | None = None,
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
        partners = self._partners(draw.partner_N, x.device, epoch, step)
        if draw.box is None:
            return mix_images(x, partners, lam=draw.lam)
        return mix_images(x, partners, boxes=to_device(np.array(draw.box), x.device))

    def _laid_out(self, images_NCHW: Tensor) -> Tensor:
        return images_NCHW.to(dtype=self.dtype, memory_format=self.layout)

    def _partners(
        self, partner_N: np.ndarray, device: torch.device, epoch: int, step: int
    ) -> Tensor:
        """Where they lie in the batch, or the partners' images themselves."""
        if self.partners is None:
            return to_device(partner_N, device)
        # A partner may live on another rank; its pixels follow from its id and the epoch alone.
        index = self.partners.global_index(epoch, step)
        mine = index[partner_N][self.partners.rank_part(step)]
        return self._laid_out(self.partners.fetch(torch.from_numpy(mine), epoch))
