"""Views of a batch: x is what the loader yields, x' is made from it here.

Teacher and student see the same pixels of a view by construction.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.augment.mix import MIXES, MixDraw, draw_mix
from fastkd.compute.collectives import join_rows
from fastkd.data.batch import Batch, Loader
from fastkd.data.picture_views import PICTURE_VIEWS
from fastkd.data.tables import to_device
from fastkd.kernels import mix as mix_images

__all__ = ["XPRIMES", "ViewMaker"]

XPRIMES = ("none", *MIXES, *PICTURE_VIEWS)
"""What x' may be: a mix of x, or a second view of its picture, which the loader makes."""


class ViewMaker:
    """Batch -> views by name, in one layout and dtype.

    xprime: one of XPRIMES.
    pool: so many x' are made of the batch, one below the other, for `selection` to choose from.
    partners: where the partners for x' come from when they may lie on another rank; None takes
    them from the batch itself.
    mixes: which of "labels" and "logits" `mixed` mixes like the pixels; labels are of num_classes.
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
        mixes: Sequence[str] = (),
        num_classes: int = 0,
    ) -> None:
        self.xprime = xprime
        self.seed = seed
        self.dtype = dtype
        self.layout = layout
        self.pool = pool
        self.partners = partners
        self.mixes = mixes
        self.num_classes = num_classes

    def __call__(self, batch: Batch, epoch: int, step: int) -> dict[str, Tensor]:
        """`x`, and `xprime` where the recipe has one."""
        x = self._laid_out(batch.images_NCHW)
        if self.xprime == "none":
            return {"x": x}
        if self.xprime in PICTURE_VIEWS:
            num = len(batch.labels_N)
            return {"x": x[:num], "xprime": x[num:]}
        draws = self._draws(len(x), x.shape[-1], epoch, step)
        mixed = [self._mixed(x, draw, epoch, step) for draw in draws]
        return {"x": x, "xprime": mixed[0] if self.pool == 1 else torch.cat(mixed)}

    def mixed(
        self,
        batch: Batch,
        teacher: Mapping[str, Tensor],
        epoch: int,
        step: int,
        rows_of_ranks: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """What x' has of its images, fp32 by need: `xprime/mixed/labels`, `xprime/mixed/logits`.

        Labels as one-hot rows and the teacher's logits of x, each mixed with that of the partner in
        the shares of their pixels; an x' of one image has that image's own. Ranks whose images are
        partners exchange their rows, and rows_of_ranks says how many each has.
        """
        found: dict[str, Tensor] = {}
        side = batch.images_NCHW.shape[-1]
        for tap in self.mixes:
            if tap == "labels":
                rows_NC = F.one_hot(batch.labels_N, self.num_classes)
            else:
                rows_NC = teacher["x/teacher/logits"]
            rows_NC = rows_NC.float()
            found[f"xprime/mixed/{tap}"] = self._inherited(
                rows_NC, side, epoch, step, rows_of_ranks
            )
        return found

    def _inherited(
        self, rows_NC: Tensor, side: int, epoch: int, step: int, rows_of_ranks: Sequence[int]
    ) -> Tensor:
        if self.xprime in PICTURE_VIEWS:
            return rows_NC.repeat(self.pool, 1)
        everyone_NC, mine = rows_NC, slice(None)
        if self.partners:
            everyone_NC = join_rows(rows_NC, rows_of_ranks)
            mine = self.partners.rank_part(step)
        made = []
        for draw in self._draws(len(rows_NC), side, epoch, step):
            if draw.partner_N is None:
                made.append(rows_NC)
                continue
            partners_NC = everyone_NC[to_device(draw.partner_N[mine], rows_NC.device)]
            stays = draw.stays(side)
            made.append(stays * rows_NC + (1.0 - stays) * partners_NC)
        return torch.cat(made)

    def _draws(self, num: int, side: int, epoch: int, step: int) -> list[MixDraw]:
        """For a batch of `num` images on this rank."""
        if self.partners:
            num = self.partners.global_size(step)
        where = {"seed": self.seed, "epoch": epoch, "step": step}
        return [
            draw_mix(self.xprime, **where, num=num, side=side, number=number)
            for number in range(self.pool)
        ]

    def _mixed(self, x: Tensor, draw: MixDraw, epoch: int, step: int) -> Tensor:
        boxes = None if draw.box is None else to_device(np.array(draw.box), x.device)
        if draw.partner_N is None:
            return mix_images(x, boxes=boxes)
        partners = self._partners(draw.partner_N, x.device, epoch, step)
        return mix_images(x, partners, boxes=boxes, lam=draw.lam if boxes is None else None)

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
