"""Pictures of what networks answer, pixel by pixel, beside the labels: predictions.png of a run.

Flow: `runs.pictures` asks the saved networks, this draws. matplotlib is used as in
`fastkd.report.plots`, on its file-only backend.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastkd.data.sources.label_ids import NO_CLASS
from fastkd.errors import RunFailed
from fastkd.printable import in_words, printable
from fastkd.report.colours import RGB, WRONG, colours_of
from fastkd.storage.atomic import atomic_path

__all__ = ["Example", "draw_predictions", "plot_predictions"]

_MOST_CLASSES, _LONGEST = 40, 24
_COLUMN, _TALLEST = 2.9, 60.0
"""Inches of a column, and the most of a figure."""


@dataclass(frozen=True)
class Example:
    """One image, its label map, and what each network answers at every pixel of it."""

    picture: Image.Image
    """RGB."""
    label_HW: np.ndarray
    """Class ids, NO_CLASS where there is none."""
    answers: Mapping[str, np.ndarray]
    """Class ids [H, W] by the name of the network; the last one's errors are drawn."""


def draw_predictions(
    path: Path,
    examples: Sequence[Example],
    classes: Sequence[str],
    palette: Sequence[RGB] | None,
    *,
    title: str = "",
) -> str:
    """`plot_predictions`, and where they are; or why not: a trained run never fails for these."""
    try:
        plot_predictions(path, examples, classes, palette, title=title)
    except Exception as error:  # matplotlib also fails on fonts and on caches of its own
        return f"no pictures: {error if isinstance(error, RunFailed) else in_words(error)}"
    return f"pictures {path}"


def plot_predictions(
    path: Path,
    examples: Sequence[Example],
    classes: Sequence[str],
    palette: Sequence[RGB] | None,
    *,
    title: str = "",
) -> None:
    """A row for each example: image, label, every network's answer, errors of the last network.

    classes: names by class id. palette: their colours; None, or too short: see `colours_of`.

    Raises:
        RunFailed: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    chosen = colours_of(len(classes), palette)
    colours = np.array(chosen, dtype=np.uint8)
    names = list(examples[0].answers)
    titles = ["image", "label", *names, f"errors of {names[-1]}"]
    with rc_context({"font.size": 10, "axes.titlesize": 11, "figure.dpi": 100}):
        tallest = max(one.picture.height / one.picture.width for one in examples)
        patches, labels = _legend(examples, classes, chosen)
        columns = _legend_columns(labels, _COLUMN * len(titles))
        below = 0.25 * math.ceil(len(labels) / columns) + 0.2
        height = _COLUMN * tallest * len(examples) + 0.35 + (0.4 if title else 0) + below
        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.0)
        figure = Figure(figsize=(_COLUMN * len(titles), min(height, _TALLEST)), layout=layout)
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(examples), len(titles), squeeze=False)
        for row, example in zip(grid, examples, strict=True):
            panels = [
                np.asarray(example.picture),
                _coloured(example.label_HW, colours),
                *(_coloured(example.answers[name], colours) for name in names),
                _errors(example, names[-1]),
            ]
            for axes, panel in zip(row, panels, strict=True):
                axes.imshow(panel, interpolation="nearest")
                axes.set_axis_off()
        for axes, text in zip(grid[0], titles, strict=True):
            axes.set_title(text)
        if title:
            figure.suptitle(title)
        figure.legend(
            patches, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=10
        )
        with atomic_path(path) as beside:
            figure.savefig(beside, format="png", dpi=150)


def _coloured(ids_HW: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """RGB of class ids; white without a class."""
    known_HW = ids_HW < len(colours)
    return np.where(known_HW[..., None], colours[np.where(known_HW, ids_HW, 0)], np.uint8(255))


def _errors(example: Example, name: str) -> np.ndarray:
    """The image in pale grey, wrong pixels in colour, white where there is no label."""
    label_HW = example.label_HW
    grey = example.picture.convert("L").resize(label_HW.shape[::-1], Image.Resampling.BILINEAR)
    pale_HW = (130 + 0.35 * np.asarray(grey, dtype=np.float32)).astype(np.uint8)
    error_HWC = np.repeat(pale_HW[..., None], 3, axis=2)
    error_HWC[example.answers[name] != label_HW] = WRONG
    error_HWC[label_HW == NO_CLASS] = 255
    return error_HWC


def _legend(
    examples: Sequence[Example], classes: Sequence[str], colours: Sequence[RGB]
) -> tuple[list[Any], list[str]]:
    """Patches and names of the classes in the pictures, in their order; of many the commonest."""
    from matplotlib.patches import Patch

    pixels_C = np.zeros(len(classes), dtype=np.int64)
    unlabelled = False
    for example in examples:
        for ids_HW in (example.label_HW, *example.answers.values()):
            known = ids_HW[ids_HW < len(classes)]
            pixels_C += np.bincount(known, minlength=len(classes))
        unlabelled = unlabelled or bool((example.label_HW == NO_CLASS).any())
    commonest = np.argsort(-pixels_C, kind="stable")[:_MOST_CLASSES]
    found: list[int] = sorted(number for number in commonest.tolist() if pixels_C[number])
    rim: dict[str, Any] = {"edgecolor": "0.4", "linewidth": 0.6}
    patches = [Patch(facecolor=_shares(colours[number]), **rim) for number in found]
    labels = [printable(classes[number], _LONGEST) for number in found]
    if unlabelled:
        patches.append(Patch(facecolor="white", **rim))
        labels.append("no label")
    patches.append(Patch(facecolor=_shares(WRONG), **rim))
    labels.append("wrong (last column)")
    return patches, labels


def _shares(colour: RGB) -> tuple[float, float, float]:
    red, green, blue = (part / 255 for part in colour)
    return red, green, blue


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """As many as fit into so many inches."""
    widest = max(map(len, labels)) * 0.085 + 0.65
    return max(1, min(len(labels), int(width / widest)))
