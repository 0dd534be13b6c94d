"""Mixed images with the label of the mix, and what the networks see (KD x data augmentation).

Drawn from `report.record=samples` of the first run that has it: the images on which the teacher
believes least in the label, and how often it disagrees on the class.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastkd.printable import printable
from fastkd.report.colours import look_of
from fastkd.report.figures.figure import WIDTHS, Drawn, FigureKind
from fastkd.report.runs_read import ReportedRun

__all__ = ["KINDS"]

_SHOWN = 4
"""Samples, as in the paper."""
_LONGEST = 17
"""Characters of a class name, as many as fit."""
_BAR = 0.82
"""Of the width of a panel, for a share of 1."""
_BLOCKS = {"target": "label", "teacher": "teacher", "student": "student"}


def _draw(runs: Sequence[ReportedRun]) -> Drawn | None:
    for run in runs:
        found = run.recorded("samples")
        if isinstance(found, dict) and found:
            epoch = max(found)
            return _drawn(run, epoch, found[epoch])
    return None


def _answers(arrays: Mapping[str, np.ndarray], block: str, sample: int) -> list[tuple[int, float]]:
    """(class, share), the largest first; of a label only the classes that it has."""
    classes = arrays[f"{block}_classes_SK"][sample].tolist()
    shares = arrays[f"{block}_shares_SK"][sample].tolist()
    pairs = list(zip(classes, shares, strict=True))
    return [pair for pair in pairs if pair[1] > 0] if block == "target" else pairs


def _drawn(run: ReportedRun, epoch: int, arrays: Mapping[str, np.ndarray]) -> Drawn:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = (run.facts.get("data") or {}).get("classes") or ()
    number = min(_SHOWN, len(arrays["images_SHWC"]))
    lines = {
        block: 2 if block == "target" else arrays[f"{block}_classes_SK"].shape[1]
        for block in _BLOCKS
    }
    tall = sum(lines.values()) + 1.6 * len(lines)
    width = WIDTHS["page"]
    side = width / number * 0.72
    figure = Figure(figsize=(width, side + 0.145 * tall + 0.45), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, number, height_ratios=[side, 0.145 * tall])
    rows: list[dict[str, Any]] = []
    for sample in range(number):
        picture = figure.add_subplot(grid[0, sample])
        picture.imshow(arrays["images_SHWC"][sample], interpolation="nearest")
        picture.set_axis_off()
        picture.set_title(f"({chr(ord('a') + sample)})")
        panel = figure.add_subplot(grid[1, sample])
        panel.set_axis_off()
        panel.set(xlim=(0, 1), ylim=(tall, 0))
        at = 0.0
        for index, (block, title) in enumerate(_BLOCKS.items()):
            at += 1.0
            pairs = _answers(arrays, block, sample)
            mixed = block == "target" and len(pairs) > 1
            called = f"{title} of the mix" if mixed else title
            panel.text(0, at, called, va="center", fontsize=7, fontweight="bold")
            for rank, (label, share) in enumerate(pairs, start=1):
                name = str(known[label]) if label < len(known) else f"class {label}"
                y = at + rank
                # The numbers stand to the right of the longest bar.
                panel.barh(y, share * _BAR, height=0.8, color=look_of(index)["color"], alpha=0.25)
                panel.text(0.01, y, printable(name, _LONGEST), va="center", fontsize=6.5)
                panel.text(1, y, f"{share:.3f}", va="center", ha="right", fontsize=6.5)
                rows.append(
                    {"run": run.label, "epoch": epoch, "sample": sample + 1, "answer": block}
                    | {"rank": rank, "class": name, "share": share}
                )
            at += lines[block] + 0.6
    share, counted = float(arrays["disagreement"]), int(arrays["counted"])
    figure.suptitle(
        f"{run.label}, epoch {epoch}: teacher and label differ in the class of {share:.0%} of "
        f"{counted} images"
    )
    return Drawn(figure, rows)


KINDS = (
    FigureKind(
        name="mix_samples",
        title="Mixed images, their labels, and what the networks see in them",
        source="KD x DA, figure 5",
        draw=_draw,
        needs="report.record=samples",
    ),
)
