"""The second view x' of a batch: CutMix or mixup with a partner from the same global batch.

One draw for the whole batch, from (seed, epoch, step) alone, so x' does not depend on the number
of ranks. Source: KD x data augmentation paper, section 3.2, and its released code: lam ~ U(0, 1),
the box has side floor(H * sqrt(1 - lam)) around a uniform centre, clipped to the image. CutMix
pairs by a permutation without fixed point, mixup by any permutation.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["MixDraw", "draw_mix", "mix_images"]

_STREAM = 3


@dataclass(frozen=True)
class MixDraw:
    """What one step does to its batch."""

    lam: float
    """Share of the image that stays (before the box is clipped)."""
    box: tuple[int, int, int, int] | None
    """top, bottom, left, right in pixels for CutMix; None for mixup."""
    partner_N: np.ndarray
    """int64: sample n of the global batch is mixed with sample partner_N[n]."""


def draw_mix(
    kind: str, *, seed: int, epoch: int, step: int, num: int, side: int, number: int = 0
) -> MixDraw:
    """The draw of one step for a global batch of `num` square images; `number` counts several."""
    key = [seed, _STREAM, epoch, step, *([number] if number else [])]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    lam = float(rng.uniform())
    if kind == "mixup":
        return MixDraw(lam, None, rng.permutation(num))
    if kind != "cutmix":
        raise ValueError(f"x' is made by cutmix or mixup, got {kind!r}")
    partner_N = rng.permutation(num)
    while num > 1 and (partner_N == np.arange(num)).any():
        partner_N = rng.permutation(num)
    cut = int(side * np.sqrt(1.0 - lam))
    cy, cx = (int(c) for c in rng.integers(side, size=2))
    edges = (cy - cut // 2, cy + cut // 2, cx - cut // 2, cx + cut // 2)
    top, bottom, left, right = (min(max(edge, 0), side) for edge in edges)
    return MixDraw(lam, (top, bottom, left, right), partner_N)


def mix_images(images_NCHW: Tensor, partners_NCHW: Tensor, draw: MixDraw) -> Tensor:
    """A new batch; the layout and dtype of the first are kept."""
    if draw.box is None:
        return torch.lerp(images_NCHW, partners_NCHW, 1.0 - draw.lam)
    top, bottom, left, right = draw.box
    mixed = images_NCHW.clone()
    mixed[:, :, top:bottom, left:right] = partners_NCHW[:, :, top:bottom, left:right]
    return mixed
