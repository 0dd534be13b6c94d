"""Policies: which operations a picture gets, with which magnitude, drawn for each sample.

Used by the loaders on their own device: uint8 crops -> [here] -> normalise. A policy reads words
of random bits that belong to (seed, epoch, sample id, appearance), so a sample looks the same for
every batch, backend and number of ranks, and no operator draws anything.

    randaugment  Cubuk et al. 2019, arXiv:1909.13719: some operations one after the other, all of
                 one magnitude, as in torchvision.transforms.v2; or as in timm, where each happens
                 half of the time, "rand-m7-mstd0.5" or with ever harder ones "rand-m7-mstd0.5-inc1"
    trivial      TrivialAugment Wide, Mueller and Hutter 2021, arXiv:2103.10158: one operation of
                 any magnitude
    autoaugment  Cubuk et al. 2018, arXiv:1805.09501: one of 25 learned pairs; those of CIFAR-10
                 for images below 64 pixels, else those of ImageNet
    3augment     DeiT III, Touvron et al. 2022, arXiv:2204.07118: grey, solarised or blurred, then
                 brightness, contrast and colour by up to 0.3
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fastkd.data.draws import as_integers, as_uniforms
from fastkd.data.policies.config import LEVELS, PolicyName, RandAugmentConfig
from fastkd.data.policies.operations import IDENTITY, LARGEST_SIGMA, OPERATIONS, Resampling
from fastkd.data.tables import to_device

__all__ = ["Policy", "Turn", "make_policy"]

_OPERATIONS = list(OPERATIONS.values())
_NUMBERS = {name: number for number, name in enumerate(OPERATIONS)}
_SMALL = 64
"""Images of fewer pixels a side get AutoAugment's policy for CIFAR-10."""
_IMAGENET_GREY = (124.0, 116.0, 104.0)
"""255 times ImageNet's means; timm fills with the means of the data, which are mostly these."""


class Turn(NamedTuple):
    """One operation for each image of a batch."""

    operation_B: np.ndarray
    """int64, positions in OPERATIONS, or IDENTITY."""
    magnitude_B: np.ndarray
    """float64"""


class Policy(ABC):
    """Random operations on uint8 images; the randomness comes in as words."""

    resampling = Resampling()

    @property
    @abstractmethod
    def words(self) -> int:
        """How many 64-bit words decide about an image."""

    @abstractmethod
    def turns(self, words_BK: np.ndarray, side: int) -> list[Turn]:
        """What is done to images of side x side pixels, one after the other."""

    def of(self, images_BHWC: Tensor, words_BK: np.ndarray) -> Tensor:
        """The images after it, uint8 on the same device."""
        images_BCHW = images_BHWC.permute(0, 3, 1, 2).clone()
        for turn in self.turns(words_BK, images_BHWC.shape[1]):
            _take(turn, images_BCHW, self.resampling)
        return images_BCHW.permute(0, 2, 3, 1)


def _take(turn: Turn, images_BCHW: Tensor, resampling: Resampling) -> None:
    """Apply a turn in place, operation by operation."""
    # Sorted by operation, so that two transfers serve all of them.
    order_B = np.argsort(turn.operation_B, kind="stable")
    numbers, counts = np.unique(turn.operation_B, return_counts=True)
    rows_B = to_device(order_B, images_BCHW.device)
    magnitude_B = to_device(turn.magnitude_B[order_B], images_BCHW.device)
    first = 0
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        part = slice(first, first + count)
        first += count
        if number == IDENTITY:
            continue
        chosen = images_BCHW.index_select(0, rows_B[part])
        changed = _OPERATIONS[number](chosen, magnitude_B[part], resampling)
        images_BCHW.index_copy_(0, rows_B[part], changed)


class _Strength(NamedTuple):
    """How an operation's magnitude follows from a level in 0..1."""

    low: float = 0.0
    high: float = 0.0
    signed: bool = False
    """Whether half of the magnitudes are negative."""
    offset: float = 0.0
    """Added after the sign."""
    of_side: bool = False
    """Whether it is a share of the image's side."""
    whole: bool = False
    """Whether it is rounded towards zero, after the sign."""

    def at(self, level_B: np.ndarray, negative_B: np.ndarray, side: int) -> np.ndarray:
        """Magnitudes, float64 [B]."""
        value_B = self.low + (self.high - self.low) * level_B
        if self.of_side:
            value_B = value_B * side
        if self.signed:
            value_B = np.where(negative_B, -value_B, value_B)
        return self.offset + (np.trunc(value_B) if self.whole else value_B)


_Space = dict[str, _Strength]


def _space(
    *, shear: float, pixels: _Strength, degrees: float, factor: float, lost_bits: int
) -> _Space:
    """torchvision's operations in its order, with these largest magnitudes."""
    factors = _Strength(0.0, factor, signed=True, offset=1.0)
    return {
        "shear_x": _Strength(0.0, shear, signed=True),
        "shear_y": _Strength(0.0, shear, signed=True),
        "translate_x": pixels,
        "translate_y": pixels,
        "rotate": _Strength(0.0, degrees, signed=True),
        "brightness": factors,
        "color": factors,
        "contrast": factors,
        "sharpness": factors,
        "posterize": _Strength(8.0, 8.0 - lost_bits),
        "solarize": _Strength(255.0, 0.0),
        "auto_contrast": _Strength(),
        "equalize": _Strength(),
    }


_OF_AUTOAUGMENT = _space(
    shear=0.3,
    pixels=_Strength(0.0, 150.0 / 331.0, signed=True, of_side=True, whole=True),
    degrees=30.0,
    factor=0.9,
    lost_bits=4,
)
_WIDE = _space(
    shear=0.99,
    pixels=_Strength(0.0, 32.0, signed=True, whole=True),
    degrees=135.0,
    factor=0.99,
    lost_bits=6,
)
_WIDE_LEVELS = 30
_TIMM_FACTORS = _Strength(0.0, 0.9, signed=True, offset=1.0)
_TIMM_INCREASING: _Space = {
    "auto_contrast": _Strength(),
    "equalize": _Strength(),
    "invert": _Strength(),
    "rotate": _Strength(0.0, 30.0, signed=True),
    "posterize": _Strength(0.0, -4.0, whole=True, offset=4.0),
    "solarize": _Strength(0.0, -256.0, whole=True, offset=256.0),
    "solarize_add": _Strength(0.0, 110.0, whole=True),
    "color": _TIMM_FACTORS,
    "contrast": _TIMM_FACTORS,
    "brightness": _TIMM_FACTORS,
    "sharpness": _TIMM_FACTORS,
    "shear_x": _Strength(0.0, 0.3, signed=True),
    "shear_y": _Strength(0.0, 0.3, signed=True),
    "translate_x": _Strength(0.0, 0.45, signed=True, of_side=True),
    "translate_y": _Strength(0.0, 0.45, signed=True, of_side=True),
}
_TIMM: _Space = {
    **_TIMM_INCREASING,
    "posterize": _Strength(0.0, 4.0, whole=True),
    "solarize": _Strength(0.0, 256.0, whole=True),
    **dict.fromkeys(
        ("color", "contrast", "brightness", "sharpness"), _Strength(0.0, 1.8, offset=0.1)
    ),
}
_LEAST_FACTOR = 0.1
_FACTORS = [_NUMBERS[name] for name in ("brightness", "color", "contrast", "sharpness")]


def _turn(
    space: _Space, choice_B: np.ndarray, level_B: np.ndarray, negative_B: np.ndarray, side: int
) -> Turn:
    """One operation of a space for each image; a choice beyond its end does nothing."""
    operation_B = np.full(len(choice_B), IDENTITY)
    magnitude_B = np.zeros(len(choice_B))
    for number, (name, strength) in enumerate(space.items()):
        chosen_B = choice_B == number
        if chosen_B.any():
            operation_B[chosen_B] = _NUMBERS[name]
            magnitude_B[chosen_B] = strength.at(level_B[chosen_B], negative_B[chosen_B], side)
    return Turn(operation_B, magnitude_B)


def _are_negative(words_B: np.ndarray) -> np.ndarray:
    return as_integers(words_B, 2).astype(bool)


@dataclass(frozen=True)
class RandAugment(Policy):
    """`operations` of torchvision's fourteen, one of which does nothing, at one magnitude."""

    operations: int
    magnitude: float
    """Up to LEVELS."""

    @property
    def words(self) -> int:
        """The operation and its sign, each time."""
        return 2 * self.operations

    def turns(self, words_BK: np.ndarray, side: int) -> list[Turn]:
        """One after the other; the same operation may come twice."""
        level_B = np.full(len(words_BK), self.magnitude / LEVELS["torchvision"])
        space = _OF_AUTOAUGMENT
        return [
            _turn(
                space,
                as_integers(words_BK[:, k], len(space) + 1),
                level_B,
                _are_negative(words_BK[:, k + 1]),
                side,
            )
            for k in range(0, self.words, 2)
        ]


@dataclass(frozen=True)
class TimmRandAugment(Policy):
    """timm's: each operation happens half of the time, at a level drawn around the magnitude.

    timm draws between bilinear and bicubic; here it is always bilinear.
    """

    increasing: bool
    """Whether a higher level is always harder, timm's "inc1"."""
    operations: int
    magnitude: float
    """Up to LEVELS."""
    spread: float
    """Standard deviation of the magnitude."""
    resampling = Resampling("bilinear", _IMAGENET_GREY)

    @property
    def words(self) -> int:
        """The operation, whether it happens, its sign, and two for a normal number."""
        return 5 * self.operations

    def turns(self, words_BK: np.ndarray, side: int) -> list[Turn]:
        """One after the other; the same operation may come twice."""
        return [self._one(words_BK[:, k : k + 5], side) for k in range(0, self.words, 5)]

    def _one(self, words_B5: np.ndarray, side: int) -> Turn:
        space = _TIMM_INCREASING if self.increasing else _TIMM
        choice_B = as_integers(words_B5[:, 0], len(space))
        choice_B[as_integers(words_B5[:, 1], 2) == 0] = len(space)
        # Box and Muller: a normal number of two uniform ones, the first above 0.
        radius_B = np.sqrt(-2.0 * np.log(1.0 - as_uniforms(words_B5[:, 3])))
        normal_B = radius_B * np.cos(2.0 * np.pi * as_uniforms(words_B5[:, 4]))
        highest = LEVELS["timm"]
        level_B = np.clip(self.magnitude + self.spread * normal_B, 0.0, highest) / highest
        turn = _turn(space, choice_B, level_B, _are_negative(words_B5[:, 2]), side)
        least_B = np.where(np.isin(turn.operation_B, _FACTORS), _LEAST_FACTOR, -np.inf)
        return turn._replace(magnitude_B=np.maximum(turn.magnitude_B, least_B))


@dataclass(frozen=True)
class TrivialAugment(Policy):
    """One of fourteen operations, one of which does nothing, at any of 31 levels."""

    @property
    def words(self) -> int:
        """The operation, its level and its sign."""
        return 3

    def turns(self, words_BK: np.ndarray, side: int) -> list[Turn]:
        """A single one."""
        level_B = as_integers(words_BK[:, 1], _WIDE_LEVELS + 1) / _WIDE_LEVELS
        choice_B = as_integers(words_BK[:, 0], len(_WIDE) + 1)
        return [_turn(_WIDE, choice_B, level_B, _are_negative(words_BK[:, 2]), side)]


_Pair = tuple[tuple[str, float, int | None], tuple[str, float, int | None]]


@dataclass(frozen=True)
class AutoAugment(Policy):
    """One of 25 pairs of operations, each with its own probability and level."""

    @property
    def words(self) -> int:
        """The pair; for each operation whether it happens, and its sign."""
        return 5

    def turns(self, words_BK: np.ndarray, side: int) -> list[Turn]:
        """The first and the second of the pair."""
        pairs = _pairs("CIFAR10" if side < _SMALL else "IMAGENET")
        pair_B = as_integers(words_BK[:, 0], len(pairs))
        return [
            self._one(
                [pair[place] for pair in pairs],
                pair_B,
                words_BK[:, 1 + 2 * place],
                words_BK[:, 2 + 2 * place],
                side,
            )
            for place in range(2)
        ]

    @staticmethod
    def _one(
        steps: Sequence[tuple[str, float, int | None]],
        pair_B: np.ndarray,
        happens_B: np.ndarray,
        sign_B: np.ndarray,
        side: int,
    ) -> Turn:
        space: _Space = {**_OF_AUTOAUGMENT, "invert": _Strength()}
        positions = {name.replace("_", ""): number for number, name in enumerate(space)}
        of_step = np.array([positions[name.lower()] for name, _, _ in steps])
        chance = np.array([probability for _, probability, _ in steps])
        level = np.array([(bin or 0) / 9.0 for _, _, bin in steps])
        choice_B = of_step[pair_B]
        choice_B[as_uniforms(happens_B) >= chance[pair_B]] = len(space)
        return _turn(space, choice_B, level[pair_B], _are_negative(sign_B), side)


@cache
def _pairs(dataset: str) -> list[_Pair]:
    """The learned policies, which torchvision holds."""
    from torchvision.transforms import AutoAugment as OfTorchvision
    from torchvision.transforms import AutoAugmentPolicy

    return OfTorchvision(AutoAugmentPolicy[dataset]).policies  # type: ignore[return-value]


_JITTER = 0.3
_THRESHOLD = 128.0
_LEAST_SIGMA = 0.1
_JITTERED = ("brightness", "contrast", "color")
_ORDERS = np.array(list(permutations(_NUMBERS[name] for name in _JITTERED)))


@dataclass(frozen=True)
class ThreeAugment(Policy):
    """Grey, solarised or blurred; then brightness, contrast and colour in any order."""

    @property
    def words(self) -> int:
        """The first operation, sigma, the order, and three factors."""
        return 6

    def turns(self, words_BK: np.ndarray, side: int) -> list[Turn]:
        """Four."""
        names = ("grayscale", "solarize", "blur")
        choice_B = as_integers(words_BK[:, 0], len(names))
        sigma_B = _LEAST_SIGMA + (LARGEST_SIGMA - _LEAST_SIGMA) * as_uniforms(words_BK[:, 1])
        magnitude_B = np.where(choice_B == 1, _THRESHOLD, sigma_B)
        turns = [Turn(np.array([_NUMBERS[name] for name in names])[choice_B], magnitude_B)]
        order_B3 = _ORDERS[as_integers(words_BK[:, 2], len(_ORDERS))]
        for k in range(len(_JITTERED)):
            factor_B = 1.0 + _JITTER * (2.0 * as_uniforms(words_BK[:, 3 + k]) - 1.0)
            turns.append(Turn(order_B3[:, k], factor_B))
        return turns


def make_policy(name: PolicyName, randaugment: RandAugmentConfig | None = None) -> Policy | None:
    """The policy of this name; None for "none"."""
    randaugment = randaugment or RandAugmentConfig()
    if name == "randaugment" and randaugment.space != "torchvision":
        return TimmRandAugment(
            randaugment.space == "timm_increasing",
            randaugment.operations,
            randaugment.magnitude,
            randaugment.spread,
        )
    return {
        "none": lambda: None,
        "randaugment": lambda: RandAugment(randaugment.operations, randaugment.magnitude),
        "trivial": TrivialAugment,
        "autoaugment": AutoAugment,
        "3augment": ThreeAugment,
    }[name]()
