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

from fastkd.augment.mix import NOT_MIXED, MixDraw, Mixing, MixKind, draw_mix, draw_x_mix
from fastkd.compute.collectives import rows_of_partners, split_evenly
from fastkd.compute.placement import Placement
from fastkd.data.batch import Batch, TrainLoader
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

    The batches come from the loader that `opened` returns. Besides x it yields second views of the
    pictures, where x' is one. x and x' are mixed with images of all ranks, which exchange them.
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
    joined: bool = False
    """Whether the ranks' batches are parts of one: partners are then drawn from all of it."""

    def opened(self, loader: TrainLoader) -> TrainLoader:
        """The loader of the batches from which these views are made.

        UserError if it cannot provide them.
        """
        if self.xprime in PICTURE_VIEWS:
            return loader.with_views(PictureView(self.xprime, self.pool))
        return loader

    def mixed(self, batch: Batch, epoch: int, step: int) -> Batch:
        """The batch with images and labels mixed, if x is: labels are float32 rows [N, C] then.

        Every image has a class: recipes read sets that have them.
        """
        if not self.mixing:
            return batch
        side = batch.images_NCHW.shape[-1]
        draw = draw_x_mix(
            self.mixing, seed=self.seed, epoch=epoch, step=step, num=self._num(batch), side=side
        )
        labels_N = batch.labels_N
        rows_NC = F.one_hot(labels_N, self.num_classes).float()
        if draw is None:
            return batch._replace(labels_N=rows_NC)
        images_NCHW = self._mixed(self._laid_out(batch.images_NCHW), draw, batch)
        partners_N = self._of_partners(labels_N, draw, batch)
        partners_NC = F.one_hot(partners_N, self.num_classes).float()
        labels_NC = _weighted(rows_NC, partners_NC, draw.stays(side))
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
        if self.xprime in PICTURE_VIEWS:
            if batch.second_NCHW is None:
                raise ValueError(f"x' is {self.xprime}, but the loader shows x only: see `opened`")
            return {"x": x, "xprime": self._laid_out(batch.second_NCHW)}
        mixed = [self._mixed(x, draw, batch) for draw in self._draws(batch, epoch, step)]
        return {"x": x, "xprime": mixed[0] if self.pool == 1 else torch.cat(mixed)}

    def xprime_targets(
        self, batch: Batch, teacher: Mapping[str, Tensor], epoch: int, step: int
    ) -> dict[str, Tensor]:
        """Labels and teacher logits of x', mixed like its pixels, in fp32, keyed by need.

        `xprime/mixed/labels` starts from one-hot rows, `xprime/mixed/logits` from the teacher's
        logits of x. Each is mixed with its partner's in proportion to their pixels; an x' made
        from one image keeps that image's own.
        """
        found: dict[str, Tensor] = {}
        for tap in self.mixes:
            if tap == "labels":
                rows_NC = batch.labels_N
                if not rows_NC.is_floating_point():
                    rows_NC = F.one_hot(rows_NC, self.num_classes)
            else:
                rows_NC = teacher["x/teacher/logits"]
            found[f"xprime/mixed/{tap}"] = self._mixed_rows(rows_NC.float(), batch, epoch, step)
        return found

    def _mixed_rows(self, rows_NC: Tensor, batch: Batch, epoch: int, step: int) -> Tensor:
        if self.xprime in PICTURE_VIEWS:
            return rows_NC.repeat(self.pool, 1)
        side, made = batch.images_NCHW.shape[-1], []
        for draw in self._draws(batch, epoch, step):
            if draw.partner_N is None:
                made.append(rows_NC)
            else:
                partners_NC = self._of_partners(rows_NC, draw, batch)
                made.append(_weighted(rows_NC, partners_NC, draw.stays(side)))
        return torch.cat(made)

    def _num(self, batch: Batch) -> int:
        """Images among which partners are drawn."""
        return batch.global_size if self.joined else len(batch.labels_N)

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

    def _mixed(self, x: Tensor, draw: MixDraw, batch: Batch) -> Tensor:
        boxes = None if draw.box is None else to_device(np.array(draw.box), x.device)
        if draw.partner_N is None:
            return mix_images(x, boxes=boxes)
        if self.joined:
            # In the memory order of pixels, in which they are sent.
            rows_NHWC = self._of_partners(x.permute(0, 2, 3, 1), draw, batch)
            partners = rows_NHWC.permute(0, 3, 1, 2).contiguous(memory_format=self.layout)
        else:
            partners = to_device(draw.partner_N, x.device)
        return mix_images(x, partners, boxes=boxes, lam=draw.lam if boxes is None else None)

    def _of_partners(self, rows: Tensor, draw: MixDraw, batch: Batch) -> Tensor:
        """The rows of those with whom this rank's images are mixed."""
        assert draw.partner_N is not None
        if self.joined:
            rows_of_ranks = split_evenly(batch.global_size, self.placement.world.size)
            return rows_of_partners(rows, draw.partner_N, rows_of_ranks)
        return rows[to_device(draw.partner_N, rows.device)]

    def _laid_out(self, images_NCHW: Tensor) -> Tensor:
        return images_NCHW.to(dtype=self.placement.dtype, memory_format=self.layout)


def _weighted(rows_NC: Tensor, partners_NC: Tensor, stays: float) -> Tensor:
    return stays * rows_NC + (1.0 - stays) * partners_NC


def resized(images_NCHW: Tensor, side: int) -> Tensor:
    """Images made smaller, bilinear with antialias, in fp32; unchanged at their own size."""
    if side == images_NCHW.shape[-1]:
        return images_NCHW
    small_NCHW = F.interpolate(
        images_NCHW.float(), (side, side), mode="bilinear", antialias=True, align_corners=False
    )
    return small_NCHW.to(images_NCHW.dtype)
