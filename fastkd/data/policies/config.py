"""Recipe keys of the policies."""

from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from fastkd.config.section import Section

__all__ = ["LEVELS", "PolicyName", "RandAugmentConfig"]

PolicyName = Literal["none", "randaugment", "trivial", "autoaugment", "3augment"]
LEVELS = {"torchvision": 30, "timm": 10, "timm_increasing": 10}
"""Highest magnitude."""


class RandAugmentConfig(Section):
    """How strong RandAugment is (`fastkd.data.policies`)."""

    space: Literal["torchvision", "timm", "timm_increasing"] = "torchvision"
    """Whose operations: torchvision's, or timm's, each of which happens half of the time, without
    or with "inc1"."""
    operations: PositiveInt = 2
    """How many an image gets, one after the other."""
    magnitude: NonNegativeFloat = 9.0
    """How strong they are, up to 30 for torchvision's and up to 10 for timm's."""
    spread: NonNegativeFloat = 0.0
    """Standard deviation of the magnitude, for timm's."""

    @model_validator(mode="after")
    def _of_its_space(self) -> "RandAugmentConfig":
        highest = LEVELS[self.space]
        if self.magnitude > highest:
            raise ValueError(
                f"augment.randaugment.magnitude={self.magnitude:g} is above {highest}, the highest "
                f"of {self.space}'s operations"
            )
        if self.spread and self.space == "torchvision":
            raise ValueError(
                f"augment.randaugment.spread={self.spread:g} is for timm's operations: set "
                "augment.randaugment.space=timm, or leave it out"
            )
        return self
