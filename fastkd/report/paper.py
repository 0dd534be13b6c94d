"""The paper's number next to ours, at the end of a run that is a row of a paper's table.

Shown only if the run is the named recipe unchanged; otherwise the overridden keys that decide the
outcome are named instead.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.recipes.catalogue import all_recipes
from fastkd.recipes.loading import build
from fastkd.recipes.missing import missing
from fastkd.recipes.published import Published

__all__ = ["PaperRow", "paper_row"]

# Metric of a paper -> ours; an error is 1 - accuracy.
_OURS = {"top1": "accuracy", "top1_error": "accuracy", "map": "map", "class_iou": "miou"}
# Location of the data, speed, output; and the seeds, which the papers vary.
_NO_MATTER = frozenset(
    [
        "description",
        "out",
        "seed",
        "save_steps",
        "eval_epochs",
        "tensorboard",
        "track",
        "track_group",
        "report.record",
        "max_skips",
        "device",
        "precision",
        "compile",
        "channels_last",
        "deterministic",
        "baseline.lrs",
        "data.root",
        "data.seed",
        "data.backend",
        "data.download",
        "data.workers",
    ]
)
# A teacher from a file, as in the papers, instead of one that is trained first.
_NO_MATTER_OF_TEACHERS = frozenset(
    [
        "weights",
        "train",
        "mean",
        "std",
        "class_map",
        "seed",
        "min_accuracy",
        "precision",
        "compile",
    ]
)


@dataclass(frozen=True)
class PaperRow:
    """What the closing table and summary.json say about the paper."""

    row: dict[str, Any] | None
    """A row of the closing table; None if the run cannot be compared."""
    text: str
    facts: dict[str, Any]


def paper_row(name: str, keys: Mapping[str, Any], summary: Mapping[str, Any]) -> PaperRow | None:
    """The paper's number for a finished run; None if no paper prints one.

    name, keys: of the recipe that was run, as in `Recipe.dotted`.
    summary: `accuracy_last` and `accuracy_best` (or `map_..`, `miou_..`), shares of 1.
    """
    entry = all_recipes().get(name)
    cells = entry.published if entry is not None else ()
    cell = next((cell for cell in cells if cell.metric in _OURS), None)
    # A recipe file may have the name of a recipe that cannot be built.
    if entry is None or cell is None or missing(entry):
        return None
    facts = {
        "metric": cell.metric,
        "value": cell.value,
        "std": cell.std,
        "place": cell.place,
        "changed": _changed(keys, build(entry).dotted()),
    }
    if facts["changed"]:
        changed = ", ".join(facts["changed"])
        text = f"not comparable with the paper's {cell} ({cell.place}): {changed}"
        return PaperRow(None, text, facts)
    which = cell.epoch or "last"
    ours = 100 * summary[f"{_OURS[cell.metric]}_{which}"]
    if cell.metric == "top1_error":
        ours = 100 - ours
    said = "" if cell.epoch else "; the paper does not say which epoch it used"
    text = (
        f"the paper's {cell} ({cell.place}); here {ours:.2f} in the {which} epoch, "
        f"{ours - cell.value:+.2f} points{said}"
    )
    if entry.silent:
        text += (
            f". {len(entry.silent)} keys are not from the paper: fastkd recipes show {entry.name}"
        )
    return PaperRow(_row(cell, which), text, facts | {"ours": ours})


def _row(cell: Published, which: str) -> dict[str, Any]:
    error = cell.metric == "top1_error"
    notes = [f"error {cell.value:.2f}"] if error else []
    if cell.std is not None:
        notes.append(f"+- {cell.std:.2f}")
    share = (100 - cell.value if error else cell.value) / 100
    return {
        "run": f"paper, {cell.place}",
        f"{_OURS[cell.metric]}_{which}": share,
        "note": ", ".join(notes),
    }


def _changed(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """`epochs=30 (there 240)`, for every key that decides the outcome."""
    found = []
    for key in {**there, **here}:
        one, other = here.get(key), there.get(key)
        if key == "student.weights" and one and other:
            # The same file, wherever it is.
            one, other = Path(one).name, Path(other).name
        if one != other and not _no_matter(key):
            one, other = ("null" if value is None else value for value in (one, other))
            found.append(f"{key}={one} (there {other})")
    return found


def _no_matter(key: str) -> bool:
    own = re.fullmatch(r"teacher\.(?:ensemble\.\d+\.)?(\w+)", key)
    return key in _NO_MATTER or (own is not None and own[1] in _NO_MATTER_OF_TEACHERS)
