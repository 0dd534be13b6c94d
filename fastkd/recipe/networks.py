"""Keys of student and teacher: which networks, with which weights. Part of the schema."""

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from fastkd.config.section import Deviations, Section, yaml_switch
from fastkd.errors import UserError

__all__ = ["NETWORK_OPTIONS", "MemberConfig", "StudentConfig", "TeacherConfig"]

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
    """Download the published weights of a timm or torchvision network; weights=... goes before."""
    new_head: bool = False
    """Take all but the classifier from these weights; the classifier is as initialised."""
    frozen: Literal["backbone"] | None = None
    """backbone: train only the classifier; all else computes as in evaluation, batch norms too."""

    @model_validator(mode="after")
    def _has_a_body(self) -> "StudentConfig":
        if (self.new_head or self.frozen) and not (self.weights or self.pretrained):
            what = "new_head=true replaces the classifier"
            if not self.new_head:
                what = "frozen=backbone keeps the layers"
            raise ValueError(
                f"{what} of a trained network: set weights=FILE or a run folder, or (timm and "
                f"torchvision) pretrained=true beside it"
            )
        return self

    @field_validator("block", mode="before")
    @classmethod
    def _canonical(cls, value: object) -> object:
        if value is None:
            return None
        from fastkd.models.blocks.grammar import parse_block

        # The comma of BG(2,4) makes a list of an override.
        text = ",".join(map(str, value)) if isinstance(value, list) else value
        try:
            return str(parse_block(text))  # type: ignore[arg-type]
        except UserError as error:
            raise ValueError(str(error)) from None

    @property
    def label(self) -> str:
        """For people: `wrn_40_2 G(4)`, where the block is not left to the network."""
        return f"{self.name} {self.block}" if self.block else self.name

    def options(self) -> dict[str, Any]:
        """Those of `create_model` that are set."""
        chosen = {name: getattr(self, name) for name in NETWORK_OPTIONS}
        return {name: value for name, value in chosen.items() if value is not None}


class MemberConfig(StudentConfig):
    """One frozen network that is imitated, by itself or with others (`fastkd.teachers.teacher`)."""

    train: bool = False
    """Train the teacher first with this recipe's data and optimizer, once, and keep it; not where
    teacher.weights names a finished one."""
    epochs: PositiveInt | None = None
    """Length of that training; by default that of the student."""
    lr: PositiveFloat | None = None
    """Learning rate of that training; by default that of the student."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of that training; by default that of the run. Set, it makes runs of several seeds share
    one teacher."""
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
    precision: Literal["bf16", "fp16", "fp32"] | None = None
    """Autocast type of its forward pass; by default that of the run."""
    compile: Annotated[Literal["on", "off"] | None, BeforeValidator(yaml_switch)] = None
    """torch.compile for the teacher; by default as for the run."""

    @property
    def trains(self) -> bool:
        """Whether it is trained first."""
        return self.train and self.weights is None


class TeacherConfig(MemberConfig):
    """The frozen network, or networks, that are imitated (`fastkd.teachers.teacher`,
    `fastkd.teachers.ensemble`)."""

    ensemble: tuple[MemberConfig, ...] = ()
    """Further teachers with keys of their own; the student imitates the mean probability."""

    def members(self) -> dict[str, MemberConfig]:
        """All teachers, this one first, by the key under which they stand in the recipe."""
        further = {f"teacher.ensemble.{n}": one for n, one in enumerate(self.ensemble)}
        return {"teacher": self, **further}

    @model_validator(mode="after")
    def _usable(self) -> "TeacherConfig":
        for key, one in self.members().items():
            _check_member(key, one)
        return self

    @model_validator(mode="after")
    def _different(self) -> "TeacherConfig":
        seen: dict[str, str] = {}
        # How it computes, and what is asked of it, does not make it another teacher.
        aside = {"ensemble", "min_accuracy", "precision", "compile"}
        for key, one in self.members().items():
            unread = set() if one.trains else {"train", "epochs", "lr", "seed"}
            same = seen.setdefault(repr(one.model_dump(exclude=aside | unread)), key)
            if same != key:
                raise ValueError(
                    f"{key} is {same} once more ({one.name}, the same weights): an ensemble wants "
                    f"another network or other weights"
                )
        return self


def _check_member(key: str, one: MemberConfig) -> None:
    if (one.mean is None) != (one.std is None):
        raise ValueError(f"{key}.mean and {key}.std come together: set both or neither")
    if not (one.train or one.weights or one.pretrained):
        raise ValueError(
            f"the teacher {one.name} has no weights: set {key}.weights=FILE or a run "
            f"folder, {key}.train=true, or (timm and torchvision) {key}.pretrained=true"
        )
    if not one.trains and (one.new_head or one.frozen):
        given = "new_head" if one.new_head else "frozen"
        raise ValueError(
            f"{key}.{given} is for a teacher that is trained here ({key}.train=true); finished "
            f"weights are imitated as they are: leave it away"
        )
    # What it learned from is what it sees.
    own = {"mean": one.mean, "resolution": one.resolution, "class_map": one.class_map}
    given = [name for name, value in own.items() if value is not None]
    if one.trains and given:
        raise ValueError(
            f"{key}.{given[0]} is for finished weights; a teacher that is trained here "
            f"learns from this recipe's own images and classes: leave it away, or set "
            f"{key}.weights"
        )
