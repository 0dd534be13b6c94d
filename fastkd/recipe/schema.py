"""What a run is: the typed, frozen schema of all recipe keys. The data flow starts here.

`fastkd.recipes.loading` makes a recipe from a name, a YAML file and key=value overrides, and
`fastkd.runs` runs it. Only these two see the whole recipe; the code they call gets its own
section of it, or plain values.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from fastkd.augment.config import AugmentConfig
from fastkd.compute.compiling import CompileChoice
from fastkd.compute.precision import PrecisionChoice
from fastkd.compute.ranks import DeviceChoice
from fastkd.config.section import NoEffect, Section, Since, yaml_switch
from fastkd.data.config import DataConfig
from fastkd.data.label_map_keys import wrong_appearance_key
from fastkd.data.normalization import LABEL_MAPS
from fastkd.losses.base.registry import check_needs, config_class, typed_config
from fastkd.models.config import StudentConfig
from fastkd.models.zoo.families import encoder_of
from fastkd.output.trackers.sink import TrackerName
from fastkd.recipe.encoder import (
    EncoderConfig,
    losses_of_encoder,
    weighs_classes,
    wrong_encoder,
)
from fastkd.recipe.parts import ENCODER, TEACHES
from fastkd.teachers.config import MemberConfig, TeacherConfig
from fastkd.training.config import OptimConfig, ReportConfig

__all__ = ["BaselineConfig", "Recipe"]


class BaselineConfig(Section):
    """The same student trained without a teacher, for the comparison at the end of a run."""

    lrs: tuple[PositiveFloat, ...] = ()
    """Learning rates to try; the best one is reported. Empty: no baseline."""


class Recipe(Section):
    """Everything that decides the outcome of a run."""

    name: str
    """Recipe name, also the folder below runs/."""
    description: Annotated[str, NoEffect] = ""
    """One line for `fastkd recipes`."""
    seed: int = Field(default=0, ge=0)
    """Initial weights, order, augmentation and dropout all follow from it. `data.seed` gives the
    images one of their own."""
    epochs: PositiveInt = 240
    """Passes over the training images."""
    epoch_factor: PositiveFloat = 1.0
    """Scales the whole schedule: epochs, milestones and warm-up."""
    batch_size: PositiveInt = 64
    """Images per optimizer step, over all ranks."""
    accumulate: PositiveInt = 1
    """Micro-batches per optimizer step."""
    precision: PrecisionChoice = "auto"
    """Autocast type of the forward pass; `auto` is bf16 where the device computes in it."""
    compile: Annotated[CompileChoice, BeforeValidator(yaml_switch)] = "auto"
    """torch.compile; `auto`: if the run is long enough to pay for it."""
    channels_last: bool = True
    """Memory layout of images and feature maps."""
    device: DeviceChoice = "auto"
    """Where to run."""
    deterministic: bool = False
    """Refuse kernels whose results vary from run to run (CUDA)."""
    out: Annotated[str | None, NoEffect] = None
    """Run folder; by default runs/<name>/<UTC time>-<digest>."""
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    student: StudentConfig
    teacher: TeacherConfig | None = None
    optim: OptimConfig = OptimConfig()
    losses: dict[str, SerializeAsAny[Section]]
    """Loss terms by name, each with its own keys (`fastkd.losses`)."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the student, which is then evaluated and kept."""
    sync_bn: bool = False
    """Batch statistics over all ranks."""
    save_steps: Annotated[PositiveInt | None, NoEffect] = None
    """Save every N steps, in addition to after every epoch."""
    eval_epochs: PositiveInt = 1
    """Evaluate every N epochs, and after the last."""
    max_skips: Annotated[PositiveInt, NoEffect] = 10
    """Consecutive steps with a non-finite loss or gradient before the run is given up."""
    tensorboard: Annotated[bool, NoEffect] = False
    """The old spelling of `track=tensorboard`."""
    track: Annotated[tuple[TrackerName, ...], NoEffect] = ()
    """Trackers that are shown the run as well: docs/tracking.md."""
    track_group: Annotated[str | None, NoEffect] = None
    """Under which name they group it; by default its stages together, in a sweep all runs."""
    report: Annotated[ReportConfig, NoEffect] = ReportConfig()
    baseline: BaselineConfig = BaselineConfig()
    encoder: Annotated[EncoderConfig | None, Since("0.2")] = None

    @field_validator("name")
    @classmethod
    def _is_a_folder(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][\w.:@+\-]*(/[A-Za-z0-9][\w.:@+\-]*)*", value):
            raise ValueError(
                f"name={value}: expected a folder below runs/, such as cifar10/mine: letters, "
                f"digits and . _ - : @ + in each part, the first one a letter or digit"
            )
        return value

    @field_validator("losses", mode="before")
    @classmethod
    def _typed_losses(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        # A null removes a loss of the base recipe; with a misspelled name it would remove nothing.
        for name in value:
            config_class(name)
        return {name: typed_config(name, keys) for name, keys in value.items() if keys is not None}

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if not self.losses:
            raise ValueError("a recipe needs at least one loss term, e.g. losses.ce.weight=1")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be split into accumulate={self.accumulate} "
                f"equal micro-batches"
            )
        if self.optim.schedule == "onecycle" and self.optim.warmup_epochs:
            raise ValueError(
                "optim.schedule=onecycle has its own warm-up: set optim.warmup_epochs=0"
            )
        if self.optim.warmup_epochs > self.epochs:
            raise ValueError(
                f"optim.warmup_epochs={self.optim.warmup_epochs:g} does not fit into "
                f"epochs={self.epochs}"
            )
        keeping = [name for name in self.losses if config_class(name).term.uses_index]
        if self.augment.repeats > 1 and keeping:
            raise ValueError(
                f"augment.repeats={self.augment.repeats} shows an image several times in a batch, "
                f"and losses.{keeping[0]} keeps one memory of each: leave one of them out"
            )
        terms = {name: config_class(name).term for name in self.losses}
        of_ids = [
            name
            for name, term in terms.items()
            if term.label_kind == "class" and not term.takes_soft_labels
        ]
        if self.augment.mixing and of_ids:
            raise ValueError(
                f"losses.{of_ids[0]} needs one class per image, and augment.mixup and "
                f"augment.cutmix give an image those of two: leave them out, or use losses that "
                f"take both, such as ce, bce and kd"
            )
        using = [name for name, term in terms.items() if term.uses_stages]
        if using and self.teacher is not None and self.teacher.cache is not None:
            raise ValueError(
                f"losses.{using[0]} sends the student's features through the teacher's stages in "
                f"every step, which no cache can keep: leave out teacher.cache"
            )
        if self.augment.sizes and self.teacher is not None and self.teacher.cache_maps:
            raise ValueError(
                f"teacher.cache_maps={','.join(self.teacher.cache_maps)} keeps maps of one size, "
                f"and with augment.sizes they change theirs: leave one of them out"
            )
        check_needs(
            self.losses,
            has_teacher=self.teacher is not None,
            xprime=self.augment.xprime,
            picks=self.augment.pick is not None,
            frozen=self.student.frozen is not None,
        )
        return self

    @model_validator(mode="after")
    def _records_what_there_is(self) -> "Recipe":
        if self.teacher is None and (said := self.report.wrong_alone()) is not None:
            raise ValueError(said)
        return self

    @model_validator(mode="after")
    def _has_an_encoder(self) -> "Recipe":
        if self.encoder is None:
            return self
        trained = [one.name for one in self.teachers().values() if one.trains]
        cached = self.teacher is not None and self.teacher.cache is not None
        said = wrong_encoder(
            self.encoder, self.data, self.student, self.losses, trained=trained, cached=cached
        )
        if said is not None:
            raise ValueError(said)
        return self

    @model_validator(mode="after")
    def _suits_its_labels(self) -> "Recipe":
        if (said := wrong_appearance_key(self.augment, self.data.name)) is not None:
            raise ValueError(said)
        if self.data.name in LABEL_MAPS and (key := self.augment.beyond_pixels):
            raise ValueError(
                f"augment.{key} is for labels of whole images, and data.name={self.data.name} has "
                f"a label for every pixel: leave it out"
            )
        squares = [f"{key}.resolution" for key, one in self.teachers().items() if one.resolution]
        if self.data.name in LABEL_MAPS and squares:
            raise ValueError(
                f"{squares[0]} shows a teacher squares of another size, and data.name="
                f"{self.data.name} has label maps of any shape: leave it out"
            )
        return self

    def teachers(self) -> dict[str, MemberConfig]:
        """All teachers by their key in the recipe; may be empty."""
        return self.teacher.members() if self.teacher else {}

    @property
    def trackers(self) -> tuple[TrackerName, ...]:
        """All that are asked for, each once."""
        old: tuple[TrackerName, ...] = ("tensorboard",) if self.tensorboard else ()
        return tuple(dict.fromkeys((*old, *self.track)))

    @property
    def data_seed(self) -> int:
        """Seed of everything random about the images: `data.seed`, or else `seed`."""
        return self.seed if self.data.seed is None else self.data.seed

    @property
    def total_epochs(self) -> int:
        """Epochs after `epoch_factor`."""
        return max(1, round(self.epochs * self.epoch_factor))

    @property
    def shown_epochs(self) -> int:
        """Epochs that have views of their own: all, or those before `augment.cycle` ends."""
        return min(self.total_epochs, self.augment.cycle or self.total_epochs)

    def scaled_optim(self) -> OptimConfig:
        """The optimizer section after `epoch_factor`: milestones and warm-up in actual epochs.

        An exponential decay reaches the same final rate. The values follow from a validated
        section and may leave its bounds, so they are not validated again.
        """
        stretched = self.optim.schedule == "exponential"
        return self.optim.model_copy(
            update={
                "gamma": self.optim.gamma ** (1 / self.epoch_factor if stretched else 1),
                "milestones": tuple(
                    m * (self.total_epochs if m < 1 else self.epoch_factor)
                    for m in self.optim.milestones
                ),
                "warmup_epochs": self.optim.warmup_epochs * self.epoch_factor,
            }
        )

    def digest(self) -> str:
        """Sixteen hex digits that identify the outcome; `config.section` says which keys enter."""
        keys = self.absolute().outcome()
        if self.augment.cycle and self.shown_epochs == self.total_epochs:
            # The run ends before a view comes again.
            del keys["augment"]["cycle"]
        # FSP and AB compare neighbours: the order of the pairs is part of the loss.
        for loss in keys["losses"].values():
            if "pairs" in loss:
                loss["pairs"] = list(loss["pairs"].items())
        return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]

    def dotted(self) -> dict[str, Any]:
        """Dotted key -> plain value; the entries of a list of sections are numbered."""
        return _dotted("", self.model_dump(mode="json"))

    def absolute(self) -> "Recipe":
        """The same recipe with paths that are valid in every working folder."""

        def net(config: Any) -> Any:
            return config.model_copy(update={"weights": _absolute(config.weights)})

        teacher = self.teacher
        if teacher:
            others = tuple(net(one) for one in teacher.ensemble)
            cache = teacher.cache if teacher.cache == "auto" else _absolute(teacher.cache)
            teacher = net(teacher).model_copy(update={"ensemble": others, "cache": cache})
        keys = ("root", "labels", "image_dir", "label_dir", "classes_file")
        places = {key: _absolute(getattr(self.data, key)) for key in keys}
        data = self.data.model_copy(update=places)
        return self.model_copy(
            update={"data": data, "student": net(self.student), "teacher": teacher}
        )

    def replace(self, **changes: Any) -> "Recipe":
        """A validated copy with other values of some top-level keys."""
        values = {key: getattr(self, key) for key in type(self).model_fields} | changes
        return type(self).model_validate(
            {k: v.model_dump() if isinstance(v, Section) else v for k, v in values.items()}
            | {"losses": {k: _plain(v) for k, v in values["losses"].items()}}
        )

    def as_teacher(self, teacher: MemberConfig | None = None) -> "Recipe":
        """The recipe that trains this recipe's teacher, or another member, on the labels."""
        teacher = teacher or self.teacher
        if teacher is None:
            raise ValueError(f"recipe {self.name} has no teacher")
        fields = StudentConfig.model_fields
        epochs = teacher.epochs or self.epochs
        # One that is fine-tuned starts from its weights.
        starts = teacher.weights is not None or teacher.pretrained
        # What blocks and depth name may lie behind its encoder.
        starts = starts or teacher.blocks is not None or teacher.depth is not None
        has_encoder = encoder_of(teacher.name) is not None and not starts
        return self.without_teacher(f"{TEACHES}{self.data.name}/{teacher.name}").replace(
            epochs=epochs,
            seed=self.seed if teacher.seed is None else teacher.seed,
            student=StudentConfig(**{key: getattr(teacher, key) for key in fields}),
            optim=self._optim_over(epochs, teacher.lr),
            encoder=self.encoder if has_encoder else None,
            # A cycle spares answers of a teacher, of which this one has none.
            augment=self.augment.model_copy(update={"xprime": "none", "pick": None, "cycle": None}),
            # Several runs share its folder.
            report=ReportConfig(),
        )

    def of_encoder(self) -> "Recipe | None":
        """The recipe that trains the encoder of this recipe's network first; None: not at all."""
        encoder = encoder_of(self.student.name)
        if self.encoder is None or encoder is None:
            return None
        epochs = self.encoder.epochs or self.epochs
        return self.replace(
            name=f"{self.name}/{ENCODER}",
            description=f"a part of {self.name}: the encoder",
            out=None,
            epochs=epochs,
            data=self.data.model_copy(update={"label_stride": self.encoder.label_stride}),
            student=self.student.model_copy(update={"name": encoder.name}),
            losses=losses_of_encoder(self.losses, encoder.taps, self.encoder),
            optim=self._optim_over(epochs),
            baseline=BaselineConfig(),
            encoder=None,
            report=ReportConfig(),
        )

    def over(self, epochs: int) -> "Recipe":
        """The same training in so many epochs, with warm-up and milestones in proportion."""
        return self.replace(epochs=epochs, epoch_factor=1.0, optim=self._optim_over(epochs))

    def _optim_over(self, epochs: int, lr: float | None = None) -> OptimConfig:
        """The optimizer of a training of this length in place of the recipe's own."""
        share = epochs / self.epochs
        changed = {
            "lr": lr or self.optim.lr,
            # Milestones from 1 up are epochs and scale with the run. One that would fall into the
            # first epoch becomes a share of the run, as everything below 1 is.
            "milestones": tuple(
                m if m < 1 else m * share if m * share >= 1 else m / self.epochs
                for m in self.optim.milestones
            ),
            "warmup_epochs": self.optim.warmup_epochs * share,
        }
        return self.optim.model_copy(update=changed)

    def _of_labels(self) -> dict[str, Any]:
        """The loss on labels alone: binary cross entropy as the recipe has it, or cross entropy."""
        if "bce" in self.losses:
            return {"bce": _plain(self.losses["bce"]) | {"weight": 1.0}}
        weighing = [_plain(loss) for loss in self.losses.values() if weighs_classes(loss)]
        kept = {"class_weights": weighing[0]["class_weights"]} if weighing else {}
        return {"ce": {"weight": 1.0} | kept}

    def without_teacher(self, name: str, lr: float | None = None) -> "Recipe":
        """The same budget on the labels alone: only the loss (and, if given, the rate) differs."""
        return self.replace(
            name=name,
            description=f"a part of {self.name}: labels alone",
            out=None,
            teacher=None,
            losses=self._of_labels(),
            encoder=self.encoder if encoder_of(self.student.name) else None,
            augment=self.augment.model_copy(update={"xprime": "none", "pick": None}),
            report=self.report.alone(),
            baseline=BaselineConfig(),
            optim=self.optim if lr is None else self.optim.model_copy(update={"lr": lr}),
        )


def _dotted(prefix: str, node: Mapping[str, Any]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, value in node.items():
        if key == "ensemble":  # the only list of sections
            value = {str(number): one for number, one in enumerate(value)}
        if isinstance(value, Mapping):
            keys |= _dotted(f"{prefix}{key}.", value)
        else:
            keys[f"{prefix}{key}"] = value
    return keys


def _absolute(path: str | None) -> str | None:
    return path if path is None else os.path.abspath(os.path.expanduser(path))


def _plain(value: Section | dict[str, Any]) -> dict[str, Any]:
    return value.model_dump() if isinstance(value, Section) else value
