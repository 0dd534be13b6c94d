"""Which recipe keys go together with label maps, and which with labels of whole images.

The sections and the recipe ask here when they are validated, `fastkd.data.loaders.dense_pair` once
more for keys that come from elsewhere. Every answer is the sentence that says what is wrong, or
None.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastkd.data.normalization import LABEL_MAPS

if TYPE_CHECKING:
    from fastkd.data.config import AppearanceConfig, DataConfig

__all__ = ["wrong_appearance_key", "wrong_data_key"]

PHOTOMETRIC = ("none", "3augment")
"""Policies that move no pixel."""

_OF_PAIRS = ("image_dir", "label_dir", "classes_file")
_OF_FRAMES = ("eval_resize", "eval_crop", "eval_interpolation", "eval_mode")

_Rules = Iterable[tuple[bool, str]]


def wrong_data_key(data: "DataConfig") -> str | None:
    """Of the section `data`."""
    return _first(_with_maps(data) if data.name in LABEL_MAPS else _without_maps(data))


def _with_maps(data: "DataConfig") -> _Rules:
    name = f"data.name={data.name} has label maps"
    framed = _given(data, _OF_FRAMES)
    yield _of_other_sets(data)
    yield (
        data.backend == "dali",
        f"data.backend=dali decodes images without their label maps, and {name}: use "
        "data.backend=torch or resident",
    )
    yield (
        data.on_bad == "skip",
        f"data.on_bad=skip shows another image for one that cannot be read, and {name}: repair or "
        "remove the pair, which `fastkd data check` names",
    )
    yield (
        data.exif == "apply",
        f"data.exif=apply turns photos, and {name}, which would not turn with them: turn both "
        "beforehand, or leave it out",
    )
    yield (
        data.tune_share is not None,
        f"data.tune_share={data.tune_share} takes a share of every class, and {name}: leave it out",
    )
    yield (
        framed is not None,
        f"data.{framed} is for images that are evaluated on their centre, and {name}: they are "
        f"evaluated whole, at data.image_size",
    )
    yield (
        data.multiple % data.label_stride != 0,
        f"data.label_stride={data.label_stride} does not divide data.multiple={data.multiple}: "
        "images are padded to a multiple of both, so set data.multiple to one",
    )


def _without_maps(data: "DataConfig") -> _Rules:
    yield _of_other_sets(data)
    for key in ("multiple", "label_stride"):
        value = getattr(data, key)
        yield (
            value != type(data).model_fields[key].default,
            f"data.{key}={value} is for sets with label maps ({', '.join(LABEL_MAPS)}), "
            f"data.name={data.name} has labels of whole images: leave it out",
        )
    yield (
        data.eval_mode == "whole",
        f"data.eval_mode=whole is for sets with label maps, data.name={data.name} has labels of "
        "whole images: use center or squash",
    )


def _of_other_sets(data: "DataConfig") -> tuple[bool, str]:
    key = _given(data, _OF_PAIRS)
    return (
        key is not None and data.name != "pairs",
        f"data.{key}={getattr(data, key or 'name')} is for data.name=pairs, got {data.name}: leave "
        f"it out (data.{key}=null)",
    )


def _given(data: "DataConfig", keys: Iterable[str]) -> str | None:
    """The first of these keys that is set."""
    return next((key for key in keys if getattr(data, key) is not None), None)


def wrong_appearance_key(appearance: "AppearanceConfig", name: str) -> str | None:
    """Of the section `augment`, for images of the set `name`."""
    if name not in LABEL_MAPS:
        return _first(
            (
                getattr(appearance, key) is not None,
                f"augment.{key} is for sets with label maps ({', '.join(LABEL_MAPS)}), data.name="
                f"{name} has labels of whole images: leave it out (augment.{key}=null)",
            )
            for key in ("scale", "window")
        )
    return _first(_of_appearance(appearance, f"data.name={name} has label maps"))


def _of_appearance(appearance: "AppearanceConfig", name: str) -> _Rules:
    yield (
        appearance.crop == "resized",
        f"augment.crop=resized squeezes areas of any shape into a square, and {name}: use "
        "augment.scale and augment.window, or augment.crop=pad",
    )
    yield (
        appearance.pad_mode == "reflect",
        f"augment.pad_mode=reflect shows pixels twice, and {name}: added pixels are black and have "
        "no label (augment.pad_mode=zero)",
    )
    yield (
        appearance.policy not in PHOTOMETRIC,
        f"augment.policy={appearance.policy} shears, moves and turns the image, and {name}, which "
        "would stay: use 3augment, which changes colours only, or none",
    )
    yield (
        appearance.erasing > 0,
        f"augment.erasing={appearance.erasing:g} hides what a label names, and {name}: leave it "
        "out (augment.erasing=0)",
    )


def _first(rules: _Rules) -> str | None:
    return next((said for applies, said in rules if applies), None)
