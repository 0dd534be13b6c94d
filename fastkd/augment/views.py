"""Views of a batch: x is what the loader yields, x' is mixed from it here or comes with it.

Teacher and student see the same pixels of a view by construction.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.augment.mix import MixDraw, MixKind, draw_mix, draw_partners, has_partners
from fastkd.compute.collectives import join_rows
from fastkd.compute.placement import Placement
from fastkd.data.batch import Batch, TrainLoader
from fastkd.data.partners import Partners
from fastkd.data.picture_views import PICTURE_VIEWS, PictureKind, PictureView
from fastkd.data.tables import to_device
from fastkd.kernels import mix as mix_images

__all__ = ["XPRIMES", "ViewMaker", "XPrime"]

XPrime = Literal["none", MixKind, PictureKind]
"""Kinds of x': a mix of x, or a second view of its picture."""
XPRIMES: tuple[XPrime, ...] = get_args(XPrime)


class ViewMaker:
    """Batch -> views by name, in one layout and dtype.

    The batches come from the loader that `opened` returns. Besides x it yields what x' is made
    from: second views of the pictures or, with several ranks, the partners.

    pool: number of x' made from the batch, one below the other, for `fastkd.augment.pick` to choose
    from.
    mixes: which of "labels" and "logits" `xprime_targets` mixes like the pixels; labels are of
    num_classes.
    """

    def __init__(
        self,
        xprime: XPrime,
        *,
        seed: int,
        placement: Placement,
        layout: torch.memory_format,
        pool: int = 1,
        mixes: Sequence[str] = (),
        num_classes: int = 0,
    ) -> None:
        self.xprime: XPrime = xprime
        self.seed = seed
        self.placement = placement
        self.layout = layout
        self.pool = pool
        self.mixes = mixes
        self.num_classes = num_classes

    def opened(self, loader: TrainLoader) -> TrainLoader:
        """The loader of the batches from which these views are made.

        UserError if it cannot provide them.
        """
        # On one rank all partners are in the batch.
        if has_partners(self.xprime) and self.placement.world.size > 1:
            return loader.with_views(Partners(self._partners))
        if self.xprime in PICTURE_VIEWS:
            return loader.with_views(PictureView(self.xprime, self.pool))
        return loader

    def __call__(self, batch: Batch, epoch: int, step: int) -> dict[str, Tensor]:
        """`x`, and `xprime` where the recipe has one."""
        x = self._laid_out(batch.images_NCHW)
        if self.xprime == "none":
            return {"x": x}
        second = None if batch.second_NCHW is None else self._laid_out(batch.second_NCHW)
        if self.xprime in PICTURE_VIEWS:
            if second is None:
                raise ValueError(f"x' is {self.xprime}, but the loader shows x only: see `opened`")
            return {"x": x, "xprime": second}
        draws = self._draws(batch, epoch, step)
        partners = [None] * self.pool if second is None else second.split(len(x))
        mixed = [self._mixed(x, *each) for each in zip(draws, partners, strict=True)]
        return {"x": x, "xprime": mixed[0] if self.pool == 1 else torch.cat(mixed)}

    def xprime_targets(
        self,
        batch: Batch,
        teacher: Mapping[str, Tensor],
        epoch: int,
        step: int,
        rows_of_ranks: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """Labels and teacher logits of x', mixed like its pixels, in fp32, keyed by need.

        `xprime/mixed/labels` starts from one-hot rows, `xprime/mixed/logits` from the teacher's
        logits of x. Each is mixed with its partner's in proportion to their pixels; an x' made
        from one image keeps that image's own. Ranks whose images are partners exchange rows;
        rows_of_ranks gives the number on each rank.
        """
        found: dict[str, Tensor] = {}
        for tap in self.mixes:
            if tap == "labels":
                rows_NC = batch.labels_N
                if not rows_NC.is_floating_point():
                    rows_NC = F.one_hot(rows_NC, self.num_classes)
            else:
                rows_NC = teacher["x/teacher/logits"]
            found[f"xprime/mixed/{tap}"] = self._mixed_rows(
                rows_NC.float(), batch, epoch, step, rows_of_ranks
            )
        return found

    def _mixed_rows(
        self, rows_NC: Tensor, batch: Batch, epoch: int, step: int, rows_of_ranks: Sequence[int]
    ) -> Tensor:
        if self.xprime in PICTURE_VIEWS:
            return rows_NC.repeat(self.pool, 1)
        everyone_NC, mine = rows_NC, slice(None)
        if batch.second_NCHW is not None:
            everyone_NC = join_rows(rows_NC, rows_of_ranks)
            first = sum(rows_of_ranks[: self.placement.world.rank])
            mine = slice(first, first + len(rows_NC))
        made = []
        for draw in self._draws(batch, epoch, step):
            if draw.partner_N is None:
                made.append(rows_NC)
                continue
            partners_NC = everyone_NC[to_device(draw.partner_N[mine], rows_NC.device)]
            stays = draw.stays(batch.images_NCHW.shape[-1])
            made.append(stays * rows_NC + (1.0 - stays) * partners_NC)
        return torch.cat(made)

    def _draws(self, batch: Batch, epoch: int, step: int) -> list[MixDraw]:
        """One for each x' of the pool."""
        shared = batch.second_NCHW is not None
        return [
            draw_mix(
                self.xprime,
                seed=self.seed,
                epoch=epoch,
                step=step,
                num=batch.global_size if shared else len(batch.labels_N),
                side=batch.images_NCHW.shape[-1],
                number=number,
            )
            for number in range(self.pool)
        ]

    def _partners(self, epoch: int, step: int, num: int) -> list[np.ndarray]:
        """Who is mixed with whom in the same draws, for the loader."""
        return [
            draw_partners(
                self.xprime, seed=self.seed, epoch=epoch, step=step, num=num, number=number
            )
            for number in range(self.pool)
        ]

    def _mixed(self, x: Tensor, draw: MixDraw, partners_NCHW: Tensor | None) -> Tensor:
        boxes = None if draw.box is None else to_device(np.array(draw.box), x.device)
        if draw.partner_N is None:
            return mix_images(x, boxes=boxes)
        # Without given partners, x is mixed with other rows of the batch.
        partners = to_device(draw.partner_N, x.device) if partners_NCHW is None else partners_NCHW
        return mix_images(x, partners, boxes=boxes, lam=draw.lam if boxes is None else None)

    def _laid_out(self, images_NCHW: Tensor) -> Tensor:
        return images_NCHW.to(dtype=self.placement.dtype, memory_format=self.layout)
