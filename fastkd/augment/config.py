"""Recipe keys for the views of a batch: geometry, the second view x', the pick."""

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from fastkd.augment.pick import PickCriterion
from fastkd.augment.views import XPrime
from fastkd.config.section import Section
from fastkd.data.config import GeometryConfig

__all__ = ["AugmentConfig", "PickConfig"]


class PickConfig(Section):
    """Which x' of a pool are used (`fastkd.augment.pick`); every process picks from a pool made of
    its own share of the batch."""

    criterion: PickCriterion = "kl"
    """What makes an image hard."""
    temperature: PositiveFloat = 4.0
    """Temperature of the criterion kl; usually the loss's."""
    pool: int = Field(default=2, ge=2)
    """How many x' are made and scored per image of the batch."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Share of the pool that is used."""
    images: PositiveInt | None = None
    """A fixed number instead of a share, per process; a smaller pool is used whole."""
    update_statistics: bool = True
    """Whether the student's batch norm statistics see the pool, as in the released code."""


class AugmentConfig(GeometryConfig):
    """What happens to a training image (`fastkd.augment.views`); all others are only normalised."""

    xprime: XPrime = "none"
    """The second view x' of every batch: made from x with one draw for the whole batch (the first
    three), or from the picture of x with one draw per image (the last three)."""
    pick: PickConfig | None = None
    """Choose x' from a pool of them."""

    @model_validator(mode="after")
    def _crops_differ(self) -> "AugmentConfig":
        crops = self.crop == "resized" or (self.crop == "pad" and self.padding > 0)
        if self.xprime == "cropflip" and not (crops or self.flip):
            raise ValueError(
                "augment.xprime=cropflip would be x again, which is neither cropped nor flipped "
                "at random: set augment.padding or augment.flip=true"
            )
        return self
