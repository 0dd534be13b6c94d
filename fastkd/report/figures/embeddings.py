"""t-SNE of what the last layers get of three classes: teacher, student alone, distilled student.

"On the Demystification of Knowledge Distillation", figure 2. The numbers are those
that `runs.activations` keeps beside a report; one row of panels for each run.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.printable import in_words, printable
from fastkd.report.colours import look_of
from fastkd.report.figures.figure import Drawn, FigureKind, Width, legend_below, new_figure
from fastkd.report.runs_read import ReportedRun

__all__ = ["KINDS"]

_NETWORKS = {"teacher": "teacher", "alone": "student alone", "student": "student distilled"}
_PERPLEXITY = 30.0
_SEED = 0


def _draw(runs: Sequence[ReportedRun]) -> Drawn | None:
    shown = [
        (run, found)
        for run in runs
        if run.last_layers is not None and (found := _read(run.last_layers))
    ]
    if not shown:
        return None
    names = [name for name in _NETWORKS if any(f"{name}_ND" in arrays for _, arrays in shown)]
    width: Width = "column" if len(names) == 1 else "page"
    figure, axes = new_figure(width, panels=(len(shown), len(names)), ratio=0.95)
    rows: list[dict[str, Any]] = []
    for line, (run, arrays) in zip(axes, shown, strict=True):
        for name, panel in zip(names, line, strict=True):
            panel.grid(visible=False)
            # The axes of a t-SNE have no unit.
            panel.set(xticks=[], yticks=[])
            panel.spines[["top", "right"]].set_visible(True)
            if f"{name}_ND" not in arrays:
                panel.set_axis_off()
                continue
            rows += _scattered(panel, run, name, arrays)
            title = f"{_title(name, run)}, {float(arrays[f'{name}_accuracy']):.0%} right"
            panel.set_title(title if len(shown) == 1 else f"{title}\n{run.label}")
    if len({tuple(arrays["classes_K"].tolist()) for _, arrays in shown}) == 1:
        legend_below(figure, axes, columns=3, title="class")
    else:
        for line in axes:
            next(panel for panel in line if panel.axison).legend(title="class", fontsize=6)
    return Drawn(figure, rows)


def _read(file: Path) -> dict[str, np.ndarray]:
    """Empty for a file that is damaged, which a warning says."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # a zip file fails in many ways
        warnings.warn(f"{file} is damaged ({in_words(error)}): left out", stacklevel=2)
        return {}


def _title(name: str, run: ReportedRun) -> str:
    return "student" if name == "student" and run.key("teacher") is None else _NETWORKS[name]


def _scattered(
    panel: Any, run: ReportedRun, name: str, arrays: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    labels_N = arrays["labels_N"]
    places_N2 = _embedded(arrays[f"{name}_ND"])
    known = (run.facts.get("data") or {}).get("classes") or ()
    rows: list[dict[str, Any]] = []
    for index, label in enumerate(arrays["classes_K"].tolist()):
        called = str(known[label]) if label < len(known) else f"class {label}"
        own_N2 = places_N2[labels_N == label]
        look = look_of(index)
        panel.scatter(
            own_N2[:, 0],
            own_N2[:, 1],
            s=7,
            alpha=0.7,
            linewidths=0,
            color=look["color"],
            marker=look["marker"],
            label=printable(called, 24),
        )
        rows += [
            {"run": run.label, "network": _title(name, run), "class": called, "x": x, "y": y}
            for x, y in own_N2.tolist()
        ]
    return rows


def _embedded(activations_ND: np.ndarray) -> np.ndarray:
    """Places [N, 2] of a seeded t-SNE that starts from the first two principal components."""
    from sklearn.manifold import TSNE

    images = len(activations_ND)
    perplexity = min(_PERPLEXITY, max((images - 1) / 3, 1.0))
    tsne = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=_SEED)
    return tsne.fit_transform(activations_ND.astype(np.float32))


KINDS = (
    FigureKind(
        name="tsne",
        title="t-SNE of the input of the last layer, three classes of validation images",
        source="Demystification, figure 2",
        draw=_draw,
        needs="--predict",
    ),
)
