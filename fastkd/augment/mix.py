"""The draw of CutMix, mixup or Cutout for one step: it makes the second view x', or mixes x.

One draw for the whole batch, from (seed, epoch, step) alone, so it does not depend on the number
of ranks; `fastkd.kernels.mix` applies it. Source: KD x data augmentation paper, section 3.2 and
appendix C, and its released code: lam ~ U(0, 1), the box has side floor(H * sqrt(1 - lam)) around
a uniform centre, clipped to the image. CutMix pairs by a permutation without fixed point, mixup by
any permutation. Cutout fills a square of a quarter of the side, 8 of 32 or 56 of 224 pixels, with
the mean colour, at the same place in all images; the original (DeVries and Taylor 2017,
arXiv:1708.04552) draws a place for each image. On x, lam ~ Beta(alpha, alpha) as in the papers of
mixup and CutMix and in timm.
"""

import math
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple, get_args

import numpy as np

from fastkd.data.draws import as_beta, as_integers, as_permutation, as_uniforms, step_words

__all__ = [
    "MIXES",
    "NOT_MIXED",
    "MixDraw",
    "MixKind",
    "Mixing",
    "cut_box",
    "draw_mix",
    "draw_partners",
    "draw_x_mix",
]

MixKind = Literal["cutmix", "mixup", "cutout"]
MIXES: tuple[MixKind, ...] = get_args(MixKind)


@dataclass(frozen=True)
class MixDraw:
    """What one step does to its batch."""

    lam: float
    """Share of the image that stays (before the box is clipped); 1 for Cutout, which takes pixels
    but no share of the label."""
    box: tuple[int, int, int, int] | None
    """top, bottom, left, right in pixels for CutMix and Cutout; None for mixup."""
    partner_N: np.ndarray | None
    """int64: sample n of the global batch is mixed with sample partner_N[n]; None for Cutout."""

    def stays(self, side: int) -> float:
        """Weight of the image's own label: the share that the clipped box leaves, or lam."""
        if self.box is None or self.partner_N is None:
            return self.lam
        top, bottom, left, right = self.box
        return 1.0 - (bottom - top) * (right - left) / side**2


@dataclass(frozen=True)
class Mixing:
    """How x is mixed; false if it is not."""

    mixup: float = 0.0
    """alpha of mixup, 0 for none."""
    cutmix: float = 0.0
    """alpha of CutMix, 0 for none."""
    share: float = 1.0
    """Of the batches."""

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


NOT_MIXED = Mixing()


def draw_mix(
    kind: str, *, seed: int, epoch: int, step: int, num: int, side: int, number: int = 0
) -> MixDraw:
    """The draw of one step for a global batch of `num` square images; `number` counts several."""
    if kind not in MIXES:
        raise ValueError(f"x' is made by {', '.join(MIXES)}, got {kind!r}")
    words = step_words(seed, epoch, step, number, 0, 3)
    if kind == "cutout":
        row, column = as_integers(words[1:], side).tolist()
        return MixDraw(1.0, _box(side, side // 4 // 2, row, column), None)
    partner_N = draw_partners(kind, seed=seed, epoch=epoch, step=step, num=num, number=number)
    return _mixed(kind, float(as_uniforms(words[0])), words[1:3], side, partner_N)


def draw_x_mix(
    mixing: Mixing, *, seed: int, epoch: int, step: int, num: int, side: int
) -> MixDraw | None:
    """What happens to x in a step, for a global batch of `num` square images; None: nothing."""
    drawn = _x_draw(mixing, seed, epoch, step)
    if drawn.kind is None:
        return None
    alpha = mixing.mixup if drawn.kind == "mixup" else mixing.cutmix
    partner_N = draw_partners(drawn.kind, seed=seed, epoch=epoch, step=step, num=num)
    return _mixed(drawn.kind, as_beta(drawn.lam, alpha), drawn.place, side, partner_N)


class _XDraw(NamedTuple):
    kind: MixKind | None
    lam: np.uint64
    """A word for lambda."""
    place: np.ndarray
    """Two for the centre of the box."""


def _x_draw(mixing: Mixing, seed: int, epoch: int, step: int) -> _XDraw:
    # The first word is lambda of x', which is uniform.
    _, row, column, whether, which, lam = step_words(seed, epoch, step, 0, 0, 6)
    happens = mixing and as_uniforms(whether) < mixing.share
    first: MixKind = "cutmix" if as_uniforms(which) < 0.5 else "mixup"
    if not (mixing.mixup and mixing.cutmix):
        first = "mixup" if mixing.mixup else "cutmix"
    return _XDraw(first if happens else None, lam, np.array([row, column]))


def _mixed(kind: str, lam: float, place: np.ndarray, side: int, partner_N: np.ndarray) -> MixDraw:
    """The draw of CutMix or mixup. place: two words for the centre of the box."""
    row, column = as_integers(place, side).tolist()
    box = None if kind == "mixup" else cut_box(side, lam, row, column)
    return MixDraw(lam, box, partner_N)


def draw_partners(
    kind: str, *, seed: int, epoch: int, step: int, num: int, number: int = 0
) -> np.ndarray:
    """`partner_N` of the draw of one step, for CutMix and mixup."""
    permutations = (
        as_permutation(step_words(seed, epoch, step, number, attempt, num)) for attempt in count(1)
    )
    if kind == "mixup":
        return next(permutations)
    return next(p for p in permutations if num == 1 or (p != np.arange(num)).all())


def cut_box(side: int, lam: float, row: int, column: int) -> tuple[int, int, int, int]:
    """top, bottom, left, right of the box that leaves `lam`, around a pixel, within the image."""
    return _box(side, int(side * math.sqrt(1.0 - lam)) // 2, row, column)


def _box(side: int, half: int, row: int, column: int) -> tuple[int, int, int, int]:
    edges = (row - half, row + half, column - half, column + half)
    top, bottom, left, right = (min(max(edge, 0), side) for edge in edges)
    return top, bottom, left, right
