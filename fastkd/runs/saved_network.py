"""A network with its trained weights that answers for pictures of any size.

`fastkd predict` and the pictures at the end of a run ask it. A picture is shown as in the run's
evaluation: cut to a square for a classifier; for a network that labels pixels whole, its short side
resized, and the answers come back at any size by `fastkd.models.dense.logits_at`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastkd.compute.placement import Placement
from fastkd.config.section import Normalization
from fastkd.data.geometry import Normalizer
from fastkd.data.sources.cuts import framing_cut
from fastkd.data.sources.joint_cuts import JointView
from fastkd.errors import UserError
from fastkd.evaluation.evaluate import answer
from fastkd.models.card import card_of, title_of
from fastkd.models.dense import logits_at
from fastkd.models.registry import model_from_file
from fastkd.recipe.schema import Recipe
from fastkd.storage.facts import DataFacts, Framing
from fastkd.storage.weight_file import WeightFile
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.teacher import Teacher

__all__ = [
    "SavedNetwork",
    "Seen",
    "View",
    "label_map_of",
    "open_saved",
    "weights_of",
    "whole_view",
]

_CLASSES_AT_ONCE = 8


class Seen(NamedTuple):
    """A picture as it is shown to a network."""

    pixels_HWC: np.ndarray
    """uint8 RGB."""
    inside: tuple[int, int]
    """Height and width of what shows the picture, from the upper left corner; the rest is black."""


@dataclass(frozen=True)
class View:
    """How a run shows pictures in evaluation."""

    shown: Framing | JointView
    """As squares; or whole, as the loaders of label maps show them."""

    def of(self, picture: Image.Image) -> Seen:
        """An RGB picture of any size."""
        if isinstance(self.shown, Framing):
            square = framing_cut(picture.size, self.shown).of(picture)
            return Seen(np.asarray(square), square.size)
        cut = self.shown.whole(picture.size)
        width, height = cut.resized
        return Seen(cut.of_image(picture), (height, width))


def whole_view(recipe: Recipe) -> View:
    """How a recipe on labelled pixels shows pictures."""
    return View(JointView(recipe.data.image_size, recipe.data.multiple, train=False))


@dataclass(frozen=True)
class SavedNetwork:
    """A network that is asked, not trained."""

    forward: Callable[[Tensor], Tensor]
    """Normalised images [N, 3, H, W] -> logits."""
    view: View
    normalization: Normalization
    placement: Placement

    def logits(self, seen: Sequence[Seen]) -> Tensor:
        """fp32 logits of pictures that are shown at one size."""
        mean, std = self.normalization
        normalize = Normalizer(mean, std, self.placement.dtype, self.placement.channels_last)
        pixels_NHWC = torch.from_numpy(np.stack([one.pixels_HWC for one in seen]))
        images_NCHW = normalize(pixels_NHWC.to(self.placement.device))
        with torch.no_grad():
            return answer(self.forward, images_NCHW, self.placement.precision)

    def label_map(self, picture: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
        """uint8 class ids of a picture, at its own size or at this height and width."""
        seen = self.view.of(picture)
        return label_map_of(self.logits([seen]), seen, size or (picture.height, picture.width))


def label_map_of(logits_1CHW: Tensor, seen: Seen, size: tuple[int, int]) -> np.ndarray:
    """uint8 class ids [H, W] at a size, of the logits of what a network has seen.

    Class by class: logits of all classes at the size of a photograph may not fit into memory.
    """
    height, width = seen.inside
    best_HW, found_HW = None, None
    for first in range(0, logits_1CHW.shape[1], _CLASSES_AT_ONCE):
        some = logits_1CHW[:, first : first + _CLASSES_AT_ONCE]
        whole = logits_at(some, (seen.pixels_HWC.shape[0], seen.pixels_HWC.shape[1]))
        value_HW, class_HW = logits_at(whole[:, :, :height, :width], size)[0].max(0)
        class_HW += first
        if best_HW is None or found_HW is None:
            best_HW, found_HW = value_HW, class_HW
            continue
        better_HW = value_HW > best_HW
        best_HW = torch.where(better_HW, value_HW, best_HW)
        found_HW = torch.where(better_HW, class_HW, found_HW)
    assert found_HW is not None
    return found_HW.to(torch.uint8).cpu().numpy()


def open_saved(file: WeightFile, recipe: Recipe, placement: Placement) -> SavedNetwork:
    """The network of a run's best.safetensors, shown pictures as in that run.

    recipe: of the run.

    Raises:
        UserError: the file does not say its network or how pictures are shown to it, or the network
            fails on such a picture.
    """
    model, facts = model_from_file(file), file.network
    card = card_of(model)
    normalization = facts.normalization or (card.normalization if card else None)
    if recipe.data.mean and recipe.data.std:
        normalization = recipe.data.mean, recipe.data.std
    if normalization is None:
        raise UserError(f"{file} does not say how images are normalised: set data.mean, data.std")
    network = Teacher(
        LoadedNet(model, normalization, name=title_of(model)),
        {},
        placement,
        data_normalization=normalization,
        # Exactly what its evaluation computed.
        fold_batch_norm=False,
    )
    dense = "miou" in file.facts
    view = whole_view(recipe) if dense else View(_framing_in(facts.data, recipe, file))
    return SavedNetwork(network.logits, view, normalization, placement)


def _framing_in(facts: DataFacts | None, recipe: Recipe, file: WeightFile) -> Framing:
    if facts is not None and facts.evaluation is not None:
        return facts.evaluation
    keys = recipe.data
    size = keys.eval_crop or keys.image_size or (facts.image_size if facts else None)
    if size is None:
        raise UserError(
            f"{file} does not say how pictures are shown to its network, as a run of fastkd 0.1: "
            f"evaluate it by fastkd eval, or train it again"
        )
    chosen = {"interpolation": keys.eval_interpolation, "mode": keys.eval_mode}
    framing = {"resize": keys.eval_resize or size, "crop": size}
    framing |= {key: value for key, value in chosen.items() if value is not None}
    return Framing.model_validate(framing)


def weights_of(run: Path) -> Path:
    """The best weights of a run folder. UserError: it is none, or has none yet."""
    if not (run / "config.yaml").exists():
        raise UserError(f"{run} is not a run folder: it has no config.yaml")
    weights = run / "best.safetensors"
    if not weights.exists():
        raise UserError(f"{run} has no best.safetensors yet: it has not been evaluated so far")
    return weights
