"""`fastkd predict`: what a trained network says about any pictures, written into a folder.

A network that labels pixels gives a label map for each picture, a classifier one CSV file.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastkd.compute.ranks import open_world
from fastkd.data.sources.decode import open_rgb
from fastkd.data.sources.pixels import Decoding
from fastkd.data.sources.progress import in_threads
from fastkd.data.sources.tree import is_image, is_system
from fastkd.errors import RunFailed, UserError
from fastkd.models.card import card_of
from fastkd.models.registry import model_from_file
from fastkd.output.call_record import read_call
from fastkd.output.console import Console
from fastkd.output.run_folder import RunFolder, csv_text
from fastkd.printable import few, shown
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.report.colours import RGB, colours_of
from fastkd.runs.evaluate_saved import recipe_for
from fastkd.runs.saved_network import (
    SavedNetwork,
    Seen,
    label_map_of,
    open_saved,
    weights_of,
)
from fastkd.runs.stages import Session
from fastkd.storage.atomic import atomic_path, writing
from fastkd.storage.weight_file import WeightFile

__all__ = ["images_among", "predict", "save_label_map"]

CLASSES, PREDICTIONS = "classes.csv", "predictions.csv"
_TOP = 5
_AT_ONCE = {True: 4, False: 64}
"""Pictures that are in memory at a time: of label maps, and of squares."""


@dataclass
class _Found:
    """What was predicted so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    unread: list[UserError] = field(default_factory=list)


def predict(run: str, words: Sequence[str], out: str) -> str:
    """Predict every picture with the best weights of a run folder; says what is where.

    words: image files, and folders of which all images are taken, with those of their folders; for
        a run of `fastkd.distill` also keys of the data that say how its images were made.

    Raises:
        UserError: this is no run folder, or of `fastkd.distill` without these keys; there is no
            image, an image cannot be read (all others are predicted first), or a file would be
            overwritten.
    """
    folder, target = Path(run), Path(out)
    file = WeightFile.open(weights_of(folder))
    dense = "miou" in file.facts
    keys = [word for word in words if word.startswith("data.") and "=" in word]
    if read_call(folder) is not None:
        recipe = _recipe_of_call(run, file, keys, dense=dense)
    elif keys:
        raise UserError(
            f"how pictures are shown is in the files of {run}: leave out {shown(keys[0])}"
        )
    else:
        recipe = load_recipe(None, config=folder / "config.yaml")
    images = images_among([word for word in words if word not in keys], besides=target)
    _check_targets(images, target, dense=dense)
    with open_world(recipe.device) as world:
        session = Session(world, Console(enabled=False), Path("runs"))
        network = open_saved(file, recipe, session.placement(recipe))
        facts = file.network
        names = facts.data.classes if facts.data else None
        classes = names or tuple(map(str, range(facts.num_classes or 0)))
        _make(target)
        found, paths = _Found(), list(images)
        frames = _frames(paths, network, recipe.data.decoding, found.unread, dense=dense)
        if dense:
            _write_maps(frames, network, images, target, classes, palette_in(folder))
        else:
            found.rows += _rows(frames, network, classes, several="map" in file.facts)
            _write(target / PREDICTIONS, csv_text(found.rows))
    done = len(images) - len(found.unread)
    if found.unread:
        raise UserError(
            f"{len(found.unread)} of {len(images)} images could not be read, {done} were "
            f"predicted: {found.unread[0]}"
        )
    what = f"label maps, and their classes in {CLASSES}" if dense else f"rows in {PREDICTIONS}"
    return f"{done} {what}: {target}"


def _recipe_of_call(run: str, file: WeightFile, keys: Sequence[str], *, dense: bool) -> Recipe:
    """A recipe that shows pictures as the script of a `fastkd.distill` did, by keys of the data.

    UserError: they do not say it, or the network is the script's own.
    """
    card = card_of(model_from_file(file))
    assert card is not None and card.name is not None
    recipe = recipe_for(card.name, ["data.name=folder", *keys])
    needed = ("mean", "std") if dense else ("image_size", "mean", "std")
    if lacking := [f"data.{key}=.." for key in needed if getattr(recipe.data, key) is None]:
        raise UserError(
            f"{run} is a run of fastkd.distill, and how its images are made is in the script that "
            f"made it: predict there, by Result.predict(loader), or say it here, "
            f"{' '.join(lacking)}"
        )
    return recipe


def images_among(words: Sequence[str], *, besides: Path | None = None) -> dict[Path, Path]:
    """Image files by path, and below what name their predictions go: the path within a folder.

    besides: a folder of predictions, which may lie among the images.

    Raises:
        UserError: something does not exist, or there is no image at all.
    """
    if not words:
        raise UserError("name the images: fastkd predict RUN IMAGE.. --out DIR, or their folders")
    found: dict[Path, Path] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            found |= {one: one.relative_to(path) for one in _images_below(path, besides)}
        elif path.exists():
            found[path] = Path(path.name)
        else:
            raise UserError(f"there is no file or folder {shown(word)}")
    if not found:
        raise UserError(f"no image found in {few(words)}: expected files such as .jpg or .png")
    return found


def _images_below(folder: Path, besides: Path | None) -> Iterator[Path]:
    aside = besides.resolve() if besides else None
    for place, folders, names in os.walk(folder):
        if place != str(folder) and Path(place).resolve() == aside:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not is_system(name))
        for name in sorted(names):
            if is_image(name) and not is_system(name):
                yield Path(place, name)


def _check_targets(images: Mapping[Path, Path], target: Path, *, dense: bool) -> None:
    """UserError if two predictions would have one name, or one would replace an image."""
    if target.exists() and not target.is_dir():
        raise UserError(f"--out {shown(str(target))} is a file: name a folder")
    if not dense:
        return
    taken: dict[Path, Path] = {}
    own = {path.resolve() for path in images}
    for path, name in images.items():
        place = _map_of(name, target)
        if (other := taken.setdefault(place, path)) != path:
            raise UserError(
                f"{shown(str(other))} and {shown(str(path))} would both become "
                f"{shown(str(place))}: predict them into different folders"
            )
        if place.resolve() in own:
            raise UserError(
                f"the label map of {shown(str(path))} would replace an image: choose another --out"
            )


def _map_of(name: Path, target: Path) -> Path:
    return target / name.with_suffix(".png")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {shown(str(folder))} cannot be made: {error.strerror}; choose another one "
            f"by --out"
        ) from None


def _frames(
    paths: Sequence[Path],
    network: SavedNetwork,
    decoding: Decoding,
    unread: list[UserError],
    *,
    dense: bool,
) -> Iterator[tuple[Path, Seen, tuple[int, int]]]:
    """Each picture that can be read as the network sees it, and its own height and width."""

    def look(number: int) -> tuple[Seen, tuple[int, int]] | UserError:
        try:
            picture = open_rgb(paths[number], decoding)
        except UserError as error:
            return error
        return network.view.of(picture), (picture.height, picture.width)

    done = 0
    for some in in_threads("predicting", look, len(paths), _AT_ONCE[dense]):
        for found in some:
            if isinstance(found, UserError):
                unread.append(found)
            else:
                yield paths[done], *found
            done += 1


def _write_maps(
    frames: Iterable[tuple[Path, Seen, tuple[int, int]]],
    network: SavedNetwork,
    images: Mapping[Path, Path],
    target: Path,
    classes: Sequence[str],
    palette: Sequence[RGB] | None,
) -> None:
    """A PNG of palette colours for each picture, and what the numbers in them mean."""
    if len(classes) > 256:
        raise UserError(f"a label map holds 256 classes, and this network knows {len(classes)}")
    colours = colours_of(len(classes), palette)
    rows = [
        {"id": number, "class": name, "colour": "#{:02x}{:02x}{:02x}".format(*colours[number])}
        for number, name in enumerate(classes)
    ]
    _write(target / CLASSES, csv_text(rows))
    for path, seen, size in frames:
        map_HW = label_map_of(network.logits([seen]), seen, size)
        place = _map_of(images[path], target)
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
        save_label_map(place, map_HW, colours)


def save_label_map(path: Path, map_HW: np.ndarray, colours: Sequence[RGB]) -> None:
    """Class ids as a PNG that viewers show in colours and programs read as ids (mode P)."""
    picture = Image.fromarray(map_HW)
    picture.putpalette([part for colour in colours for part in colour])
    with atomic_path(path) as beside:
        picture.save(beside, format="PNG")


def _rows(
    frames: Iterable[tuple[Path, Seen, tuple[int, int]]],
    network: SavedNetwork,
    classes: Sequence[str],
    *,
    several: bool,
) -> Iterator[dict[str, Any]]:
    """A row for each picture: its most probable classes. several: each class for itself."""
    numbered = enumerate(frames)
    for _, some in groupby(numbered, key=lambda one: one[0] // _AT_ONCE[False]):
        taken = [frame for _, frame in some]
        logits_NC = network.logits([seen for _, seen, _ in taken]).double()
        if logits_NC.dim() != 2:
            raise RunFailed(f"the network gives {list(logits_NC.shape)}, not logits [N, classes]")
        shares_NC = logits_NC.sigmoid() if several else logits_NC.softmax(1)
        for (path, _, _), shares_C in zip(taken, shares_NC.cpu(), strict=True):
            yield {"file": str(path)} | _best(shares_C, classes)


def _best(shares_C: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    values, numbers = torch.topk(shares_C, min(_TOP, len(shares_C)))
    row: dict[str, Any] = {}
    pairs = zip(values.tolist(), numbers.tolist(), strict=True)
    for place, (value, number) in enumerate(pairs, start=1):
        suffix = "" if place == 1 else f"_{place}"
        row |= {f"class{suffix}": classes[number], f"probability{suffix}": f"{value:.6f}"}
    return row


def palette_in(folder: Path) -> list[RGB] | None:
    """The colours of the classes as the run's summary has them; None if it has none."""
    found = (RunFolder.open(folder).summary() or {}).get("palette")
    if not isinstance(found, list):
        return None
    colours = [
        (red, green, blue)
        for one in found
        if isinstance(one, list) and len(one) == 3
        for red, green, blue in [one]
        if all(isinstance(part, int) and 0 <= part <= 255 for part in one)
    ]
    return colours if len(colours) == len(found) else None


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="surrogateescape")
