"""The facts of its data that a run remembers: one schema, wherever they are written.

`fastkd.data` makes them; facts.json and summary.json of a run folder hold them as JSON, the
metadata of best.safetensors as one text per fact. All of it may come from a stranger's file, so it
is validated when it is read.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastkd.config.section import Normalization
from fastkd.config.values import is_mapping
from fastkd.printable import brief, few

__all__ = ["DataFacts", "Framing", "FramingMode", "Interpolation", "Listing", "parsed"]

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
"""Filters by which Pillow resizes."""
FramingMode = Literal["center", "squash", "whole"]
"""The short side is resized and the aspect ratio kept, or both sides are; "whole": the short side
is, and all of the picture is shown."""

_Side = Annotated[int, Field(ge=1, le=1 << 16)]
_Digest = Annotated[str, Field(max_length=64)]
_Name = Annotated[str, Field(min_length=1, max_length=1000)]


class _Fact(BaseModel):
    # A later version may write more.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Framing(_Fact):
    """How a picture of any size becomes a square: resized, then its centre cut out. Of the mode
    "whole" it keeps its shape, and `crop` is its short side."""

    resize: _Side
    """Pixels of the short side; of both sides if `squash`."""
    crop: _Side
    """Side of the square in pixels."""
    interpolation: Interpolation = "bilinear"
    mode: FramingMode = "center"

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if self.crop > self.resize:
            raise ValueError(f"a crop of {self.crop} pixels from {self.resize}")
        return self

    @classmethod
    def whole(cls, size: int) -> Self:
        """The largest central square, at this size."""
        return cls(resize=size, crop=size)

    def at(self, size: int) -> "Framing":
        """The same part of the picture, at another size."""
        resize = max(size, self.resize * size // self.crop)
        return self.model_copy(update={"resize": resize, "crop": size})

    def __str__(self) -> str:
        side = "both sides" if self.mode == "squash" else "short side"
        if self.mode == "whole":
            return f"{side} to {self.resize} ({self.interpolation}), all of it"
        return f"{side} to {self.resize} ({self.interpolation}), central {self.crop}"


class Listing(_Fact):
    """The images of one split; two differ if an image was added, removed or replaced."""

    counts: tuple[int, ...]
    """Images of each class; () where pixels are labelled."""
    num: int | None = Field(default=None, ge=0)
    """Images, where one may be of several classes."""
    files: _Digest
    """Digest of names and sizes, of label maps as of images, and of labels that the names do not
    say; of the labels if the set is held in memory."""
    contents: _Digest
    """Digest of the first `read` contents, evenly spread over the split."""
    read: int = Field(ge=0)
    times: _Digest = ""
    """Digest of names, sizes and modification times: a copy has others."""

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(self.counts) if self.num is None else self.num

    def same(self, other: "Listing") -> bool:
        """Whether both list the same images; modification times do not matter."""
        return (self.counts, self.files, self.contents, self.read) == (
            other.counts,
            other.files,
            other.contents,
            other.read,
        )


class DataFacts(_Fact):
    """Which data a network learned from, and how it is shown pictures; None: not known."""

    name: Annotated[str, Field(max_length=100)] | None = None
    """data.name."""
    classes: Annotated[tuple[_Name, ...], Field(min_length=1, max_length=1 << 20)] | None = None
    """Class names, in the order of the logits."""
    image_size: _Side | None = None
    """Side in pixels of the training images."""
    evaluation: Framing | None = None
    """How pictures are shown in evaluation."""
    normalization: Normalization | None = None
    """Channel means and deviations in 0..1."""
    train: Listing | None = None
    val: Listing | None = None

    @model_validator(mode="after")
    def _different_names(self) -> Self:
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have one name")
        return self

    @classmethod
    def read(cls, values: object) -> Self:
        """From plain values. Raises ValueError with one line that says what is wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "data"
            no_mapping = first["type"] in ("model_type", "dict_type", "model_attributes_type")
            said = "expected a mapping" if no_mapping else first["msg"]
            raise ValueError(f"{place}: {said}") from None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self | None:
        """What `to_metadata` wrote; None if nothing is there. Raises ValueError otherwise."""
        values: dict[str, Any] = {
            key: parsed(key, metadata[key]) for key in _IN_METADATA if key in metadata
        }
        more = parsed("data", metadata.get("data", "{}"))
        if not is_mapping(more):
            raise ValueError("data: expected a mapping")
        values = {key: more[key] for key in ("name", "train", "val") if key in more} | values
        if not values:
            return None
        if "normalization" in metadata:
            values["normalization"] = parsed("normalization", metadata["normalization"])
        return cls.read(values)

    def to_metadata(self) -> dict[str, str]:
        """Text by key, without what is not known."""
        known = self.plain()
        metadata = {
            key: json.dumps(known[key]) for key in (*_IN_METADATA, "normalization") if key in known
        }
        data = {key: known[key] for key in ("name", "train", "val") if key in known}
        return metadata | ({"data": json.dumps(data)} if data else {})

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON, without what is not known."""
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def named(self) -> tuple[str, ...] | None:
        """The class names; None if they are mere numbers in order, as of a set without names."""
        if self.classes is None or self.classes == tuple(map(str, range(len(self.classes)))):
            return None
        return self.classes

    def fingerprint(self, *, evaluation: bool) -> str:
        """Eight hex digits that stay the same as long as no training image changes.

        evaluation: nor a validation image, nor how it is shown.
        """
        keys = {"classes", "image_size", "train"}
        if evaluation:
            keys |= {"val", "evaluation"}
        split = {"times": True}
        known = self.model_dump(mode="json", include=keys, exclude={"train": split, "val": split})
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]

    def training_changes(self, now: "DataFacts") -> list[str]:
        """What a training sees differently now: classes, image size, images."""
        changes = _class_changes(self.classes, now.classes)
        if None not in (self.image_size, now.image_size) and self.image_size != now.image_size:
            changes.append(f"images of {now.image_size} pixels, {self.image_size} before")
        return changes + _listing_changes("train", self.train, now.train, now.classes)

    def evaluation_changes(self, now: "DataFacts") -> list[str]:
        """What an evaluation sees differently now: images, resize and crop rule."""
        changes = _listing_changes("val", self.val, now.val, now.classes)
        if self.evaluation and now.evaluation and self.evaluation != now.evaluation:
            changes.append(f"evaluation by {now.evaluation}, before by {self.evaluation}")
        return changes

    def changes(self, now: "DataFacts") -> list[str]:
        """All that a run sees differently now."""
        return self.training_changes(now) + self.evaluation_changes(now)

    def touched(self, now: "DataFacts") -> list[str]:
        """The splits of which only modification times differ and not every content was read."""
        return [
            split
            for split, one, other in (
                ("train", self.train, now.train),
                ("val", self.val, now.val),
            )
            if one and other and one.same(other)
            if one.times != other.times and other.read < other.images
        ]


_IN_METADATA = ("classes", "image_size", "evaluation")


MOST_DIGITS = 400
"""Of a whole number in metadata; the largest double has 309."""


def parsed(key: str, text: str) -> Any:
    """The JSON value of a key of the metadata. Raises ValueError that names the key."""

    def whole(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise _TooLong(f"{key}: a number of {len(digits.lstrip('-')):,} digits")
        return int(digits)

    try:
        return json.loads(text, parse_int=whole)
    except RecursionError:
        raise ValueError(f"{key}: nested too deeply") from None
    except _TooLong:
        raise
    except ValueError:
        raise ValueError(f"{key}={brief(text)}: expected JSON") from None


class _TooLong(ValueError):
    """A number that no file of fastkd holds."""


def _class_changes(before: tuple[str, ...] | None, now: tuple[str, ...] | None) -> list[str]:
    if before is None or now is None or before == now:
        return []
    new, gone = [c for c in now if c not in before], [c for c in before if c not in now]
    if not new and not gone:
        return ["the classes have another order"]
    return [
        f"{what} {'class' if len(names) == 1 else 'classes'} {few(names)}"
        for what, names in (("new", new), ("missing", gone))
        if names
    ]


def _listing_changes(
    split: str, before: Listing | None, now: Listing | None, classes: tuple[str, ...] | None
) -> list[str]:
    if before is None or now is None or before.same(now):
        return []
    if before.images != now.images:
        return [f"{now.images} images in {split}, {before.images} before"]
    if before.counts != now.counts and classes and len(before.counts) == len(classes):
        moved = [
            f"{name} {count}, before {old}"
            for name, count, old in zip(classes, now.counts, before.counts, strict=True)
            if count != old
        ]
        return [f"images in {split} moved between classes ({few(moved)})"]
    if before.files != now.files:
        return [f"other files in {split}, by their names, sizes or labels"]
    return [f"other pictures in {split} under the same names"]
