"""Recipe keys for teachers: how they are trained or loaded, and what they see."""

from typing import Annotated

from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from fastkd.compute.compiling import CompileSwitch
from fastkd.compute.precision import PrecisionName
from fastkd.config.section import Channels, Deviations, NoEffect, Since, yaml_switch
from fastkd.models.config import StudentConfig
from fastkd.teachers.cache.codec import CacheFormat

__all__ = ["MemberConfig", "TeacherConfig"]


class MemberConfig(StudentConfig):
    """One frozen network that is imitated, alone or with others (`fastkd.teachers.teacher`)."""

    train: bool = False
    """Train the teacher first with this recipe's data and optimizer, once, and keep it; not if
    teacher.weights names a finished one. With teacher.new_head=true these weights are the start of
    that training."""
    epochs: PositiveInt | None = None
    """Length of that training; by default the student's."""
    lr: PositiveFloat | None = None
    """Learning rate of that training; by default the student's."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of that training; by default the run's. Set it to let runs with several seeds share
    one teacher. Its images follow `data.seed` where that is set."""
    resolution: PositiveInt | None = None
    """Side in pixels of the images the teacher expects; by default the student's."""
    mean: Channels | None = None
    """Channel means in 0..1 that the teacher expects; by default its checkpoint's or the data's."""
    std: Deviations | None = None
    """Channel standard deviations in 0..1 that the teacher expects."""
    class_map: tuple[int, ...] | None = Field(default=None, min_length=1)
    """class_map[c] is the teacher's output for our class c, if the orders differ."""
    min_accuracy: float | None = Field(default=None, ge=0, le=1)
    """Refuse a teacher below this accuracy; by default one that is not clearly
    better than always naming the commonest class."""
    precision: PrecisionName | None = None
    """Autocast type of its forward pass; by default the run's."""
    compile: Annotated[CompileSwitch | None, BeforeValidator(yaml_switch)] = None
    """torch.compile for the teacher; by default the run's."""

    @property
    def trains(self) -> bool:
        """Whether it is trained first."""
        return self.train and (self.weights is None or self.new_head)


class TeacherConfig(MemberConfig):
    """The frozen network, or networks, that are imitated (`fastkd.teachers.teacher`,
    `fastkd.teachers.ensemble`)."""

    ensemble: tuple[MemberConfig, ...] = ()
    """Additional teachers, each with its own keys; the student imitates the mean probability."""
    cache: Annotated[str | None, NoEffect] = None
    """Folder where its answers to every view are kept: the first run writes them, later runs with
    the same teacher and views read them and do not build it. `auto`: below runs/teachers."""
    cache_format: Annotated[CacheFormat, Since("0.2")] = "full"
    """How logits are kept: `full` without loss; fp16, bf16; top16 and top8 only the most probable
    classes, in 16 or 8 bits, the rest spread evenly. What is kept is what is trained on."""
    cache_top: Annotated[PositiveInt, Since("0.2")] = 10
    """Classes of each image that top16 and top8 keep."""
    cache_maps: Annotated[tuple[str, ...], NoEffect] = ()
    """Taps of whole maps, such as stage3, that are kept although they are large."""

    def members(self) -> dict[str, MemberConfig]:
        """All teachers, this one first, by their key in the recipe."""
        further = {f"teacher.ensemble.{n}": one for n, one in enumerate(self.ensemble)}
        return {"teacher": self, **further}

    @model_validator(mode="after")
    def _usable(self) -> "TeacherConfig":
        for key, one in self.members().items():
            _check_member(key, one)
        return self

    @field_validator("cache")
    @classmethod
    def _is_a_folder(cls, value: str | None) -> str | None:
        word = (value or "").strip().lower()
        if (
            value is not None
            and value != "auto"
            and word in ("", "auto", "none", "null", "off", "no")
        ):
            raise ValueError(
                f"teacher.cache={value}: name a folder, or auto, or null for no cache (./{word} is "
                f"a folder of that name)"
            )
        return value

    @model_validator(mode="after")
    def _keeps_answers(self) -> "TeacherConfig":
        # How answers are kept says nothing without a place to keep them.
        keys = ("cache_format", "cache_top", "cache_maps")
        given = [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]
        if given and self.cache is None:
            raise ValueError(
                f"teacher.{given[0]} is for the answers that teacher.cache=DIR keeps: set it, or "
                f"leave it out"
            )
        if "cache_top" in given and not self.cache_format.startswith("top"):
            raise ValueError(
                f"teacher.cache_top={self.cache_top} is for teacher.cache_format=top16 or top8, "
                f"got {self.cache_format}: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _different(self) -> "TeacherConfig":
        seen: dict[str, str] = {}
        # How it computes, and what is required of it, does not make it another teacher.
        aside = {"ensemble", "min_accuracy", "precision", "compile", "kernels"}
        aside |= TeacherConfig.model_fields.keys() - MemberConfig.model_fields.keys()
        for key, one in self.members().items():
            unread = set() if one.trains else {"train", "epochs", "lr", "seed"}
            same = seen.setdefault(repr(one.model_dump(exclude=aside | unread)), key)
            if same != key:
                raise ValueError(
                    f"{key} is {same} again ({one.name}, the same weights): an ensemble needs "
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
        more = f"{key}.train=true" + ("" if one.new_head else f" {key}.new_head=true")
        raise ValueError(
            f"{key}.{given} is for a teacher trained by this recipe ({more}); finished weights are "
            f"imitated as they are: leave it out, or set {more} to train them on this data"
        )
    key_of_shape = "blocks" if one.blocks else "depth" if one.depth else None
    if key_of_shape and not one.trains and not one.weights:
        raise ValueError(
            f"{key}.{key_of_shape} changes the published {one.name}, which then knows nothing: set "
            f"{key}.weights to a network that was trained like this, or {key}.train=true"
        )
    # It sees what it was trained on.
    own = {"mean": one.mean, "resolution": one.resolution, "class_map": one.class_map}
    given = [name for name, value in own.items() if value is not None]
    if one.trains and given:
        cure = f"leave out {key}.new_head" if one.new_head else f"set {key}.weights"
        raise ValueError(
            f"{key}.{given[0]} is for finished weights; a teacher trained by this recipe "
            f"learns from this recipe's own images and classes: leave it out, or {cure}"
        )
