"""Views of a batch: x is what the loader yields, or mixed; x' is mixed from it or comes with it.

Teacher and student see the same pixels of a view by construction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.augment.mix import (
    NOT_MIXED,
    MixDraw,
    Mixing,
    MixKind,
    draw_mix,
    draw_partners,
    draw_x_mix,
    has_partners,
    x_mix_kind,
)
from fastkd.compute.collectives import join_rows
from fastkd.compute.placement import Placement
from fastkd.data.batch import Batch, TrainLoader
from fastkd.data.partners import Partners
from fastkd.data.picture_views import PICTURE_VIEWS, PictureKind, PictureView
from fastkd.data.tables import to_device
from fastkd.kernels import mix as mix_images

__all__ = ["XPRIMES", "ViewMaker", "XPrime", "resized"]

XPrime = Literal["none", MixKind, PictureKind]
"""Kinds of x': a mix of x, or a second view of its picture."""
XPRIMES: tuple[XPrime, ...] = get_args(XPrime)


@dataclass(frozen=True)
class ViewMaker:
    """Batch -> views by name, in one layout and dtype.

    The batches come from the loader that `opened` returns. Besides x it yields what x' is made
    from: second views of the pictures or, with several ranks, the partners, also of a mixed x.
    """

    xprime: XPrime
    _: KW_ONLY
    seed: int
    placement: Placement
    layout: torch.memory_format
    pool: int = 1
    """Number of x' made from the batch, one below the other, for `fastkd.augment.pick` to choose
    from."""
    mixes: Sequence[str] = ()
    """Which of "labels" and "logits" `xprime_targets` mixes like the pixels."""
    num_classes: int = 0
    """Of mixed labels."""
    mixing: Mixing = NOT_MIXED
    """How x itself is mixed; its labels become rows of probabilities."""
    sizes: Sequence[int] = ()
    """Sides of the images in equal parts of the run; (): their own."""
    epochs: int = 1
    """Of the run."""

    def opened(self, loader: TrainLoader) -> TrainLoader:
        """The loader of the batches from which these views are made.

        UserError if it cannot provide them.
        """
        # On one rank all partners are in the batch.
        mixed = has_partners(self.xprime) or bool(self.mixing)
        if mixed and self.placement.world.size > 1:
            return loader.with_views(Partners(self._partners))
        if self.xprime in PICTURE_VIEWS:
            return loader.with_views(PictureView(self.xprime, self.pool))
        return loader

    def mixed(
        self, batch: Batch, epoch: int, step: int, rows_of_ranks: Sequence[int] = ()
    ) -> Batch:
        """The batch with images and labels mixed, if x is: labels are float32 rows [N, C] then.

        Every image has a class: recipes read sets that have them.
        rows_of_ranks: the number of images on each rank, whose labels are exchanged.
        """
        if not self.mixing:
            return batch
        side = batch.images_NCHW.shape[-1]
        draw = draw_x_mix(
            self.mixing, seed=self.seed, epoch=epoch, step=step, num=self._num(batch), side=side
        )
        rows_NC = F.one_hot(batch.labels_N, self.num_classes).float()
        if draw is None:
            return batch._replace(labels_N=rows_NC)
        images_NCHW = self._mixed(self._laid_out(batch.images_NCHW), draw, batch.second_NCHW)
        # Ids are exchanged, not their rows; floats hold them exactly.
        everyone, mine = self._everyone(batch.labels_N[:, None].float(), batch, rows_of_ranks)
        everyone_NC = F.one_hot(everyone[:, 0].long(), self.num_classes).float()
        labels_NC = _mixed_rows(rows_NC, everyone_NC, mine, draw, side)
        return batch._replace(images_NCHW=images_NCHW, labels_N=labels_NC)

    def __call__(self, batch: Batch, epoch: int, step: int) -> dict[str, Tensor]:
        """`x`, and `xprime` where the recipe has one."""
        views = self._views(batch, epoch, step)
        if not self.sizes:
            return views
        side = self.side(epoch)
        return {name: self._laid_out(resized(view, side)) for name, view in views.items()}

    def side(self, epoch: int) -> int:
        """Side in pixels of the images in an epoch, if they have several `sizes`."""
        return self.sizes[min(epoch * len(self.sizes) // self.epochs, len(self.sizes) - 1)]

    def _views(self, batch: Batch, epoch: int, step: int) -> dict[str, Tensor]:
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
        everyone_NC, mine = self._everyone(rows_NC, batch, rows_of_ranks)
        side = batch.images_NCHW.shape[-1]
        return torch.cat(
            [
                _mixed_rows(rows_NC, everyone_NC, mine, draw, side)
                for draw in self._draws(batch, epoch, step)
            ]
        )

    def _everyone(
        self, rows_NC: Tensor, batch: Batch, rows_of_ranks: Sequence[int]
    ) -> tuple[Tensor, slice]:
        """The rows of all images that may be partners, and where this rank's are among them."""
        if batch.second_NCHW is None:
            return rows_NC, slice(None)
        first = sum(rows_of_ranks[: self.placement.world.rank])
        return join_rows(rows_NC, rows_of_ranks), slice(first, first + len(rows_NC))

    @staticmethod
    def _num(batch: Batch) -> int:
        """Images among which partners are drawn: of all ranks, if their images are here."""
        return len(batch.labels_N) if batch.second_NCHW is None else batch.global_size

    def _draws(self, batch: Batch, epoch: int, step: int) -> list[MixDraw]:
        """One for each x' of the pool."""
        return [
            draw_mix(
                self.xprime,
                seed=self.seed,
                epoch=epoch,
                step=step,
                num=self._num(batch),
                side=batch.images_NCHW.shape[-1],
                number=number,
            )
            for number in range(self.pool)
        ]

    def _partners(self, epoch: int, step: int, num: int) -> list[np.ndarray]:
        """Who is mixed with whom in the same draws, for the loader."""
        if self.mixing:
            kind = x_mix_kind(self.mixing, seed=self.seed, epoch=epoch, step=step)
            if kind is None:
                return []
            return [draw_partners(kind, seed=self.seed, epoch=epoch, step=step, num=num)]
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


def _mixed_rows(
    rows_NC: Tensor, everyone_NC: Tensor, mine: slice, draw: MixDraw, side: int
) -> Tensor:
    """Rows mixed with their partners' in proportion to the pixels of images of this side."""
    if draw.partner_N is None:
        return rows_NC
    partners_NC = everyone_NC[to_device(draw.partner_N[mine], rows_NC.device)]
    stays = draw.stays(side)
    return stays * rows_NC + (1.0 - stays) * partners_NC


def resized(images_NCHW: Tensor, side: int) -> Tensor:
    """Images made smaller, bilinear with antialias, in fp32; unchanged at their own size."""
    if side == images_NCHW.shape[-1]:
        return images_NCHW
    small_NCHW = F.interpolate(
        images_NCHW.float(), (side, side), mode="bilinear", antialias=True, align_corners=False
    )
    return small_NCHW.to(images_NCHW.dtype)
