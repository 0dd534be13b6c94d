"""Keys of student and teacher: which networks, with which weights. Part of the schema."""

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from fastkd.errors import UserError
from fastkd.recipe.section import Deviations, Section

__all__ = ["NETWORK_OPTIONS", "StudentConfig", "TeacherConfig"]

NETWORK_OPTIONS = ("width", "block", "shortcuts", "stem", "dropout")
"""Keys of student and teacher that are options of `fastkd.models.create_model`."""


class StudentConfig(Section):
    """The network that is trained (`fastkd.models`)."""

    name: str
    """Zoo name, timm:NAME or torchvision:NAME; `fastkd models` lists them."""
    width: PositiveFloat | None = None
    """Factor on all widths of a zoo residual network."""
    block: str | None = None
    """Cheap block instead of its 3x3 convolutions: G:4, G:N:8, G:N, B:2, BG:2:4, BG:2:M, S-2x2."""
    shortcuts: bool | Literal["pad", "projection"] | None = None
    """false: none; projection: only where the shape changes; pad: there without weights."""
    stem: str | None = None
    """First layers of a ResNet-18 or 34: cifar, imagenet, or imagenet-nopool."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability inside the residual blocks of a WRN."""
    weights: str | None = None
    """Initial weights: a .safetensors, .pt or .pth file, or a run folder."""
    pretrained: bool = False
    """Download the published weights of a timm or torchvision network."""

    @field_validator("block", mode="before")
    @classmethod
    def _canonical(cls, value: object) -> object:
        if value is None:
            return None
        from fastkd.models.block_grammar import parse_block

        # The comma of BG(2,4) makes a list of an override.
        text = ",".join(map(str, value)) if isinstance(value, list) else value
        try:
            return str(parse_block(text))  # type: ignore[arg-type]
        except UserError as error:
            raise ValueError(str(error)) from None

    def options(self) -> dict[str, Any]:
        """Those of `create_model` that are set."""
        chosen = {name: getattr(self, name) for name in NETWORK_OPTIONS}
        return {name: value for name, value in chosen.items() if value is not None}


class TeacherConfig(StudentConfig):
    """The frozen network that is imitated (`fastkd.teacher`)."""

    train: bool = False
    """Train the teacher first with this recipe's data and optimizer, once, and keep it; not where
    teacher.weights names a finished one."""
    epochs: PositiveInt | None = None
    """Length of that training; by default that of the student."""
    lr: PositiveFloat | None = None
    """Learning rate of that training; by default that of the student."""
    resolution: PositiveInt | None = None
    """Side in pixels the teacher wants its images; by default that of the student's."""
    mean: tuple[float, float, float] | None = None
    """Channel means in 0..1 that the teacher wants; by default its checkpoint's or the data's."""
    std: Deviations | None = None
    """Likewise its channel standard deviations."""
    class_map: tuple[int, ...] | None = Field(default=None, min_length=1)
    """class_map[c] is the teacher's output for our class c, where the orders differ."""
    min_accuracy: float | None = Field(default=None, ge=0, le=1)
    """Refuse a teacher below this accuracy; by default one that is not better than chance."""

    @model_validator(mode="after")
    def _both_or_none(self) -> "TeacherConfig":
        if (self.mean is None) != (self.std is None):
            raise ValueError("teacher.mean and teacher.std come together: set both or neither")
        return self

    @model_validator(mode="after")
    def _knows_something(self) -> "TeacherConfig":
        if not (self.train or self.weights or self.pretrained):
            raise ValueError(
                f"the teacher {self.name} has no weights: set teacher.weights=FILE or a run "
                f"folder, teacher.train=true, or (timm and torchvision) teacher.pretrained=true"
            )
        return self

    @model_validator(mode="after")
    def _sees_what_it_learned_from(self) -> "TeacherConfig":
        own = {"mean": self.mean, "resolution": self.resolution, "class_map": self.class_map}
        given = [key for key, value in own.items() if value is not None]
        if self.trains and given:
            raise ValueError(
                f"teacher.{given[0]} is for finished weights; a teacher that is trained here "
                f"learns from this recipe's own images and classes: leave it away, or set "
                f"teacher.weights"
            )
        return self

    @property
    def trains(self) -> bool:
        """Whether it is trained first."""
        return self.train and self.weights is None
