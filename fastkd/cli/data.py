"""`fastkd data check` reads every image of a data set before a run does, `pack` makes shards."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.data.loaders.dense_pair import open_both
from fastkd.data.normalization import LABEL_MAPS
from fastkd.data.sources.by_name import open_source
from fastkd.data.sources.checking import Equal, SplitCheck, check_split, equal_files
from fastkd.data.sources.folder import FolderIndex
from fastkd.data.sources.label_maps import LabelMaps
from fastkd.data.sources.packing import Shrink, pack
from fastkd.data.sources.survey import survey
from fastkd.errors import UserError
from fastkd.printable import shown
from fastkd.recipes.loading import load_recipe

__all__ = ["KEYS", "data"]

KEYS = tuple(
    f"data.{key}"
    for key in (
        "name",
        "labels",
        "image_dir",
        "label_dir",
        "classes_file",
        "val_share",
        "val_seed",
        "exif",
        "alpha",
        "white",
        "max_pixels",
    )
)
"""What decides which files are read and how."""

_SPLITS: tuple[str, ...] = ("train", "val")

_LISTED = 20
"""The most files of a kind that the text lists; --json has all."""

_KINDS = {
    "leak": "in training and in validation: the accuracy counts what was learned by heart",
    "labels": "under different labels",
    "copies": "twice or more under one label",
}


def data(options: argparse.Namespace) -> int:
    """Check or pack the data set; 1 if a run would stumble over a file."""
    if options.action == "pack":
        _pack(options)
        return 0
    for name in ("out", "shrink", "quality"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} is for `fastkd data pack`; leave it out")
    opened = _opened(options.root, options.words, broken_links=True)
    splits = [check_split(one) for one in opened]
    equal = equal_files(splits)
    print(json.dumps(_facts(splits, equal), indent=1) if options.json else _text(splits, equal))
    return 1 if any(split.bad for split in splits) else 0


def _pack(options: argparse.Namespace) -> None:
    if options.json:
        raise UserError("--json is for `fastkd data check`; leave it out")
    if options.out is None:
        raise UserError("`fastkd data pack` needs --out SHARDS, the folder that it makes")
    if options.quality is not None and options.shrink is None:
        raise UserError("--quality is for pictures that --shrink resizes: add it, or leave it out")
    shrink = None
    if options.shrink is not None:
        quality = Shrink.quality if options.quality is None else options.quality
        shrink = Shrink(options.shrink, quality)
    target = Path(options.out)
    opened = [one for one in _opened(options.root, options.words) if isinstance(one, FolderIndex)]
    if not opened:
        raise UserError(
            "shards hold images with labels as a whole, and these have label maps: train on the "
            "folder"
        )
    splits = dict(zip(_SPLITS, opened, strict=True))
    sizes = pack(splits, target, shrink)
    for split, index in splits.items():
        mib = sizes[split] / 2**20
        print(f"{index.name}: {len(index):,} images, {mib:,.1f} MiB in {shown(target)}")
    name = splits["train"].name.partition("/")[0]
    print(f"train on them with data.name={name} data.root={shown(target)}")


def _opened(
    root: str, words: Sequence[str], *, broken_links: bool = False
) -> list[FolderIndex] | list[LabelMaps]:
    """Both splits, not yet read. broken_links: list them too, so that the check names them."""
    for word in words:
        key, is_key, _ = word.partition("=")
        if not is_key or key not in KEYS:
            raise UserError(
                f"`fastkd data` got {shown(word)}; expected a folder and the keys {', '.join(KEYS)}"
            )
    # The recipe is for its data; random areas do not go with label maps.
    overrides = ["augment.crop=pad", *words, f"data.root={root}"]
    keys = load_recipe("folder", overrides=overrides).data
    if keys.name in LABEL_MAPS:
        return list(open_both(keys, broken_links=broken_links))
    # Both are opened first: a mistake in one is told before the other is read for an hour.
    sources = [
        open_source(
            keys.name,
            root,
            split,
            decoding=keys.decoding,
            holdout=keys.holdout,
            labels=keys.labels,
            broken_links=broken_links,
        )
        for split in _SPLITS
    ]
    listed = [one for one in sources if isinstance(one, FolderIndex)]
    if len(listed) < len(sources):
        raise UserError(
            f"data.name={keys.name} in {shown(root)} holds no image files; there is nothing to read"
        )
    return listed


def _text(splits: Sequence[SplitCheck], equal: Sequence[Equal]) -> str:
    lines: list[str] = []
    for split in splits:
        index = split.index
        lines.append(f"{index.name}: {len(index):,} images of {len(index.classes):,} classes")
        lines += [f"  {line}" for line in (*_numbers(split), *_remarks(split))]
        lines += _listed("cannot be read", [bad.reason for bad in split.bad])
    for kind, words in _KINDS.items():
        groups = [" = ".join(map(shown, one.files)) for one in equal if one.kind == kind]
        lines += _listed(f"equal, {words}", groups)
    num_bad = sum(len(split.bad) for split in splits)
    verdict = f"{num_bad} files have to be repaired or removed" if num_bad else "every file is read"
    return "\n".join([*lines, verdict])


def _numbers(split: SplitCheck) -> list[str]:
    counts = split.counts
    lines = [f"{min(counts):,} to {max(counts):,} images a class"]
    if split.pixels_C is not None:
        lines = _shares(split.index.classes, split.pixels_C)
    if split.median_size is not None:
        width, height = split.median_size
        sides_N = split.sizes_N2.min(1)
        lines.append(
            f"{width}x{height} pixels at the median, the short side from {sides_N.min()} to "
            f"{sides_N.max()}"
        )
    return lines + ([split.imbalance] if split.imbalance else [])


def _remarks(split: SplitCheck) -> list[str]:
    index = split.index
    return [*index.remarks, *(survey(index) if isinstance(index, FolderIndex) else ())]


def _shares(classes: Sequence[str], pixels_C: np.ndarray) -> list[str]:
    """The share of every class in the pixels, the commonest first."""
    total = max(int(pixels_C.sum()), 1)
    order = [int(id) for id in np.argsort(-pixels_C[:-1], kind="stable")]
    named = ", ".join(f"{shown(classes[id])} {pixels_C[id] / total:.2%}" for id in order)
    return [f"pixels: {named}; no class {pixels_C[-1] / total:.2%}"]


def _listed(what: str, items: Sequence[str]) -> list[str]:
    """A heading with the number of items, and the first ones."""
    if not items:
        return []
    more = [f"  .. and {len(items) - _LISTED} more; --json lists all"] * (len(items) > _LISTED)
    return [f"{len(items)} {what}:", *(f"  {item}" for item in items[:_LISTED]), *more]


def _facts(splits: Sequence[SplitCheck], equal: Sequence[Equal]) -> dict[str, Any]:
    return {
        "splits": [
            {
                "name": split.index.name,
                "images": len(split.index),
                "classes": dict(zip(split.index.classes, split.counts, strict=True)),
                "median_size": split.median_size,
                "remarks": _remarks(split),
                "imbalance": split.imbalance,
                "bad": [{"file": bad.file, "reason": bad.reason} for bad in split.bad],
            }
            for split in splits
        ],
        "equal": [{"kind": one.kind, "files": one.files} for one in equal],
    }
