"""From crops to what networks see, on the loader's device: policies, normalisation, erasing.

uint8 crop -> policy of x -> normalise -> erase -> x
                   |-> policy of x' -> normalise -> erase -> x'
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastkd.data.draws import ERASE, POLICY, sample_words
from fastkd.data.geometry import Normalizer
from fastkd.data.picture_views import PictureView
from fastkd.data.policies.erasing import WORDS_PER_RECTANGLE, erase, rectangles
from fastkd.data.policies.policy import Policy

__all__ = ["PLAIN", "Finish", "Look"]


@dataclass(frozen=True)
class Look:
    """How training images are changed after they are cut."""

    policy: Policy | None = None
    erasing: float = 0.0
    """Share of the images of which a rectangle is erased."""


PLAIN = Look()
"""As they are cut, as in evaluation."""


@dataclass(frozen=True)
class Finish:
    """Finishes crops; every draw follows from (seed, epoch, id, appearance).

    Ids are those of `fastkd.data.loaders.plan`. Appearance 0 is x, others are views of its picture.
    """

    look: Look
    normalize: Normalizer
    seed: int
    num_ids: int
    """All ids are below it."""

    def images(
        self,
        crops: Callable[[int], Tensor],
        ids_B: np.ndarray,
        epoch: int,
        second: PictureView | None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, C, H, W], and the second views, one below the other.

        crops: uint8 [B, H, W, C] of an appearance. ids_B: their ids, on the host.
        """
        look_BHWC = self._looked(crops(0), ids_B, epoch, 0)
        x_BCHW = self._image(look_BHWC, ids_B, epoch, 0)
        if second is None:
            return x_BCHW, None
        views = []
        for appearance in second.appearances:
            if second.policy is None:
                view_BHWC = self._looked(crops(appearance), ids_B, epoch, appearance)
            else:
                view_BHWC = self._after(second.policy, look_BHWC, ids_B, epoch, appearance)
            views.append(self._image(view_BHWC, ids_B, epoch, appearance))
        return x_BCHW, views[0] if len(views) == 1 else torch.cat(views)

    def _looked(self, crops_BHWC: Tensor, ids_B: np.ndarray, epoch: int, appearance: int) -> Tensor:
        if self.look.policy is None:
            return crops_BHWC
        return self._after(self.look.policy, crops_BHWC, ids_B, epoch, appearance)

    def _after(
        self, policy: Policy, images_BHWC: Tensor, ids_B: np.ndarray, epoch: int, appearance: int
    ) -> Tensor:
        words_BK = self._words(POLICY, ids_B, policy.words, epoch, appearance)
        return policy.of(images_BHWC, words_BK)

    def _image(self, look_BHWC: Tensor, ids_B: np.ndarray, epoch: int, appearance: int) -> Tensor:
        images_BCHW = self.normalize(look_BHWC)
        if not self.look.erasing:
            return images_BCHW
        words_BK = self._words(ERASE, ids_B, WORDS_PER_RECTANGLE, epoch, appearance)
        side = images_BCHW.shape[-1]
        return erase(images_BCHW, rectangles(words_BK, side, self.look.erasing))

    def _words(
        self, stream: int, ids_B: np.ndarray, count: int, epoch: int, appearance: int
    ) -> np.ndarray:
        return sample_words(self.seed, epoch, stream, self.num_ids, ids_B, count, appearance)
