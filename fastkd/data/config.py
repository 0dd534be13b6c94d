"""Recipe keys for images: where they come from, how they appear in training."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from fastkd.config.section import Channels, Deviations, NoEffect, Section, Since
from fastkd.data.geometry import Crop, PadMode
from fastkd.data.label_map_keys import wrong_data_key
from fastkd.data.normalization import DATASETS, DataName
from fastkd.data.policies.config import PolicyName, RandAugmentConfig
from fastkd.data.sources.holdout import Holdout
from fastkd.data.sources.pixels import MAX_PIXELS, Alpha, Decoding, Exif
from fastkd.storage.facts import FramingMode, Interpolation

__all__ = ["AppearanceConfig", "Backend", "DataConfig", "OnBad"]

Backend = Literal["auto", "resident", "torch", "dali"]
TrainInterpolation = Literal["bilinear", "bicubic"]
OnBad = Literal["fail", "skip"]
_LARGEST_SCALE = 10


class DataConfig(Section):
    """Where the images come from (`fastkd.data`)."""

    name: DataName
    """Data set. `folder` is any ImageFolder with train/ and val/ or test/, see `val_share`; `pairs`
    are any images with a label map (PNG) each, see `image_dir`."""
    root: str | None = None
    """Folder of the data set; digits and synthetic need none."""
    labels: Annotated[str | None, Since("0.2")] = None
    """CSV file with the columns path, label (or labels, separated by |) and split, for a folder
    whose images are not sorted into class folders."""
    image_dir: Annotated[str | None, Since("0.2")] = None
    """Folder of the images of data.name=pairs, which may have train/ and val/ or test/; by default
    images/ in root."""
    label_dir: Annotated[str | None, Since("0.2")] = None
    """Folder of their label maps, PNG files with the names of the images; by default labels/ in
    root."""
    classes_file: Annotated[str | None, Since("0.2")] = None
    """Text file with a class of data.name=pairs on each line, NAME or NAME,RED,GREEN,BLUE, in the
    order of the numbers in the label maps; by default classes.txt in root. 255, and the number of a
    class named ignore, are no class."""
    backend: Backend = "auto"
    """`resident` keeps the decoded set on the device, `torch` decodes with Pillow in worker
    processes, `dali` with NVIDIA DALI, on the GPU where there is one."""
    image_size: PositiveInt | None = None
    """Side in pixels after decoding; by default the data set's own. Of a set with label maps the
    short side, and the aspect ratio is kept."""
    multiple: Annotated[PositiveInt, Since("0.2")] = 8
    """Images with label maps are padded below and on the right, black and without labels, until
    both sides are a multiple of this, so that networks with strides fit."""
    label_stride: Annotated[PositiveInt, Since("0.2")] = 1
    """Label maps are made smaller by this factor, by nearest: 8 for a network whose answers have an
    eighth of the size of its images."""
    download: Annotated[bool, NoEffect] = False
    """Fetch a missing CIFAR archive into root."""
    train_limit: PositiveInt | None = None
    """Use only this many training images, the same share of every class; with label maps evenly
    spread over the set."""
    workers: Annotated[int, NoEffect] = Field(default=2, ge=0)
    """Decoding processes of the torch backend, or threads of the dali backend."""
    mean: Channels | None = None
    """Channel means in 0..1; by default the data set's own."""
    std: Deviations | None = None
    """Channel standard deviations in 0..1; by default the data set's own."""
    drop_last: bool = True
    """Drop the partial batch at the end of an epoch; the papers keep it."""
    eval_resize: Annotated[PositiveInt | None, Since("0.2")] = None
    """Short side in pixels of a picture in evaluation, of which the centre is cut out; by default
    256/224 of the crop for photographs, the crop itself for small images."""
    eval_crop: Annotated[PositiveInt | None, Since("0.2")] = None
    """Side in pixels of the images in evaluation; by default image_size."""
    eval_interpolation: Annotated[Interpolation | None, Since("0.2")] = None
    """How pictures are resized for the evaluation; by default bilinear."""
    eval_mode: Annotated[FramingMode | None, Since("0.2")] = None
    """`center`, the default, keeps the aspect ratio of a picture in evaluation; `squash`: not."""
    val_share: Annotated[float | None, Since("0.2")] = Field(default=None, gt=0, lt=1)
    """Share of every class that is held back for validation, for a folder that has only train/, or
    only class folders, and for pairs; one with val/ or test/ uses these."""
    val_seed: Annotated[int, Since("0.2")] = Field(default=0, ge=0)
    """Seed of that choice. It does not follow `seed`, so that no teacher has seen these images."""
    tune_share: Annotated[float | None, Since("0.2")] = Field(default=None, gt=0, lt=1)
    """Share of every class of the training images that takes the place of the validation images,
    which then nobody sees: for choosing among networks or settings. It follows `val_seed`."""
    seed: Annotated[int | None, Since("0.2")] = Field(default=None, ge=0)
    """Seed of everything random about the images: their order, crops, flips, policies, erasing and
    mixing; by default the recipe's `seed`, which keeps initial weights and dropout. Where it is
    set, all runs with it see the same images in the same order, whatever their `seed`; so does a
    teacher trained by the recipe, whatever `teacher.seed`."""
    exif: Annotated[Exif, Since("0.2")] = "ignore"
    """`apply` turns photos upright by their EXIF orientation; torchvision ignores it."""
    alpha: Annotated[Alpha, Since("0.2")] = "drop"
    """What lies behind transparent pixels: `white`, `black`, or as in torchvision `drop`, which
    shows their hidden colour."""
    white: Annotated[PositiveFloat | None, Since("0.2")] = None
    """Brightest value of grey images deeper than 8 bits, e.g. 4095 for 12 bits or 1 for floats. By
    default 65535 for 16 bits; 32-bit integers and floats need it."""
    max_pixels: Annotated[PositiveInt, NoEffect] = MAX_PIXELS
    """Largest image that is opened, in pixels; a damaged or hostile file can claim any size."""

    on_bad: Annotated[OnBad, Since("0.2")] = "fail"
    """What an image that cannot be read does: `fail` ends the run, `skip` shows the next one in
    its place, counts it in every epoch and leaves it out of the evaluation."""

    @property
    def decoding(self) -> Decoding:
        """How image files are read."""
        return Decoding(self.exif, self.alpha, self.white, self.max_pixels)

    @property
    def holdout(self) -> Holdout | None:
        """Which images are held back for validation."""
        return None if self.val_share is None else Holdout(self.val_share, self.val_seed)

    @model_validator(mode="after")
    def _reads_image_files(self) -> "DataConfig":
        if self.labels is not None and self.name != "folder":
            raise ValueError(
                f"data.labels={self.labels} is for data.name=folder, {self.name} has labels of its "
                "own: leave it out (data.labels=null)"
            )
        if self.val_share is not None and self.name not in ("folder", "pairs"):
            raise ValueError(
                f"data.val_share={self.val_share:g} is for data.name=folder or pairs, {self.name} "
                "has validation images: leave it out (data.val_share=null)"
            )
        if self.name in ("digits", "synthetic") and self.decoding.pixels != Decoding().pixels:
            raise ValueError(
                f"data.exif, data.alpha and data.white are for image files, data.name={self.name} "
                "reads none; leave them out"
            )
        return self

    @model_validator(mode="after")
    def _has_label_maps(self) -> "DataConfig":
        if (said := wrong_data_key(self)) is not None:
            raise ValueError(said)
        return self

    @model_validator(mode="after")
    def _reads_its_root(self) -> "DataConfig":
        if self.root is not None and self.name in ("digits", "synthetic"):
            raise ValueError(
                f"data.root={self.root} would not be read, data.name={self.name} needs no folder: "
                f"say what it holds with data.name ({', '.join(DATASETS)}), or leave it out "
                f"(data.root=null)"
            )
        return self


class AppearanceConfig(Section):
    """How a training image is cut (`fastkd.data.geometry`) and changed (`fastkd.data.policies`)."""

    crop: Crop = "pad"
    """`pad`: pad and crop at random; `resized`: random resized crop; `none`."""
    padding: int = Field(default=4, ge=0)
    """Pixels added on every side before the random crop."""
    pad_mode: PadMode = "zero"
    """What the added pixels hold."""
    flip: bool = True
    """Mirror half of the images."""
    interpolation: Annotated[TrainInterpolation, Since("0.2")] = "bilinear"
    """How the random areas of `resized` are brought to size."""
    scale: Annotated[tuple[PositiveFloat, PositiveFloat] | None, Since("0.2")] = None
    """Lowest and highest factor by which an image with a label map is resized at random; the
    outcome is cut to `window`, or to the size of the image."""
    window: Annotated[tuple[PositiveInt, PositiveInt] | None, Since("0.2")] = None
    """Height and width of the window that is cut out of an image with a label map at random, filled
    up without labels where the image is smaller; by default all of it. Needed where images differ
    in size."""
    policy: Annotated[PolicyName, Since("0.2")] = "none"
    """Random operations on every image: RandAugment, TrivialAugment Wide, AutoAugment, or
    3-Augment of DeiT III."""
    randaugment: Annotated[RandAugmentConfig | None, Since("0.2")] = None
    """How strong the policy randaugment is; by default as in torchvision."""
    erasing: Annotated[float, Since("0.2")] = Field(default=0.0, ge=0, le=1)
    """Share of the images of which a random rectangle is erased."""

    repeats: Annotated[PositiveInt, Since("0.2")] = 1
    """How often an image is shown in an epoch, each time changed in another way; an epoch then has
    as many images as ever, of a part of the set."""

    @field_validator("randaugment")
    @classmethod
    def _default_is_none(cls, value: RandAugmentConfig | None) -> RandAugmentConfig | None:
        """One digest for one strength."""
        return None if value == RandAugmentConfig() else value

    @model_validator(mode="after")
    def _has_its_policy(self) -> "AppearanceConfig":
        if self.policy != "randaugment" and self.randaugment is not None:
            raise ValueError(
                f"augment.randaugment is for augment.policy=randaugment, got {self.policy}: set "
                "the policy, or leave it out"
            )
        return self

    @field_validator("scale")
    @classmethod
    def _is_a_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] <= value[1] <= _LARGEST_SCALE:
            raise ValueError(
                f"augment.scale={value[0]:g},{value[1]:g}: expected the lowest factor, then the "
                f"highest one, up to {_LARGEST_SCALE}"
            )
        return value

    @model_validator(mode="after")
    def _resizes(self) -> "AppearanceConfig":
        if self.crop != "resized" and self.interpolation != "bilinear":
            raise ValueError(
                f"augment.interpolation={self.interpolation} is for augment.crop=resized, got "
                f"{self.crop}: leave it out"
            )
        return self
