"""Recipe keys for the views of a batch: how x appears and is mixed, x', and the pick."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from fastkd.augment.mix import Mixing
from fastkd.augment.pick import PickCriterion
from fastkd.augment.views import XPrime
from fastkd.config.section import Section, Since
from fastkd.data.config import AppearanceConfig

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


class AugmentConfig(AppearanceConfig):
    """What happens to a training image (`fastkd.augment.views`); all others are only normalised."""

    xprime: XPrime = "none"
    """The second view x' of every batch: made from x with one draw for the whole batch (the first
    three), or from the picture of x with one draw per image (the last three)."""
    pick: PickConfig | None = None
    """Choose x' from a pool of them."""
    mixup: Annotated[NonNegativeFloat, Since("0.2")] = 0.0
    """alpha of the Beta distribution of mixup on x, whose labels become rows of probabilities; 0:
    none."""
    cutmix: Annotated[NonNegativeFloat, Since("0.2")] = 0.0
    """alpha of CutMix on x. With both, each batch gets one of them."""
    mix_share: Annotated[float, Since("0.2")] = Field(default=1.0, gt=0, le=1)
    """Share of the batches that are mixed."""
    # torch.compile makes a graph for each shape, also of a partial batch, and stops at eight.
    sizes: Annotated[tuple[PositiveInt, ...], Since("0.2")] = Field(default=(), max_length=4)
    """Sides in pixels of the training images in up to four equal parts of the run, each at most
    their own size: the first epochs are cheaper. Evaluation keeps the full size."""
    cycle: Annotated[PositiveInt | None, Since("0.2")] = None
    """Epochs after which the views come again: order, crops, policies, mixing, x' and pools of
    epoch e are those of epoch e mod cycle; by default never. Rates, schedules and dropout go on. A
    cycle as long as the run changes nothing. The student alone keeps it; a teacher trained by the
    recipe sees new views in every epoch."""

    @property
    def mixing(self) -> Mixing:
        """How x is mixed."""
        return Mixing(self.mixup, self.cutmix, self.mix_share)

    @property
    def beyond_pixels(self) -> str | None:
        """A key that is set and for which an image must have labels as a whole, with its value."""
        wanted: dict[str, object] = {"mixup": self.mixup, "cutmix": self.cutmix}
        wanted["sizes"] = ",".join(map(str, self.sizes))
        wanted["xprime"] = "" if self.xprime == "none" else self.xprime
        return next((f"{key}={value}" for key, value in wanted.items() if value), None)

    @model_validator(mode="after")
    def _mixes_once(self) -> "AugmentConfig":
        if self.mixing and self.xprime != "none":
            raise ValueError(
                f"augment.mixup and augment.cutmix mix x, and augment.xprime={self.xprime} would "
                "be made from mixed images: use one of them"
            )
        if self.mix_share < 1 and not self.mixing:
            raise ValueError(
                f"augment.mix_share={self.mix_share:g} is for augment.mixup and augment.cutmix: "
                "set one of them, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _views_come_again(self) -> "AugmentConfig":
        if self.cycle is not None and self.sizes:
            raise ValueError(
                f"augment.cycle={self.cycle} shows the same views again, and augment.sizes="
                f"{','.join(map(str, self.sizes))} others in each part of the run: use one of them"
            )
        return self

    @model_validator(mode="after")
    def _crops_differ(self) -> "AugmentConfig":
        crops = self.crop == "resized" or (self.crop == "pad" and self.padding > 0)
        if self.xprime == "cropflip" and not (crops or self.flip):
            raise ValueError(
                "augment.xprime=cropflip would be x again, which is neither cropped nor flipped "
                "at random: set augment.padding or augment.flip=true"
            )
        return self
