"""Curves of one or several runs as a PNG; the numbers are in metrics.csv.

Flow: `report.comparison` calls `plot_curves` at the end. matplotlib draws on its file-only backend,
without touching the caller's settings.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastkd.errors import RunFailed
from fastkd.evaluation.headline import HEADLINES, headline
from fastkd.printable import in_words
from fastkd.report.colours import look_of
from fastkd.storage.atomic import atomic_path

__all__ = ["draw_curves", "plot_curves"]


def draw_curves(
    path: Path | str,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    title: str = "",
    teachers: Mapping[str, float] | None = None,
) -> str:
    """`plot_curves`, and where they are; or why not: a trained run never fails for its picture."""
    try:
        plot_curves(path, runs, title=title, teachers=teachers)
    except Exception as error:  # matplotlib also fails on fonts and on caches of its own
        return f"no curves: {error if isinstance(error, RunFailed) else in_words(error)}"
    return f"curves {path}"


def plot_curves(
    path: Path | str,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    title: str = "",
    teachers: Mapping[str, float] | None = None,
) -> None:
    """Validation accuracy (or mAP, mIoU) and training loss per epoch, one line per run.

    `runs` maps a name to rows of metrics.jsonl; `epoch`, `val_accuracy` (or `val_map`, `val_miou`,
    shares of 1) and `train_loss` are used, rows that lack one of them are left out of that panel.
    teachers: accuracies (or mAP, mIoU) by label of networks without curves, as dashed lines.

    Raises:
        RunFailed: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    metric = next((headline(rows[-1]) for rows in runs.values() if rows), "accuracy")
    with rc_context({"font.size": 10, "axes.titlesize": 11, "figure.dpi": 100}):
        figure = Figure(figsize=(10, 5), layout="constrained")
        FigureCanvasAgg(figure)
        accuracy, loss = figure.subplots(1, 2)
        for index, (name, rows) in enumerate(runs.items()):
            look = look_of(index)
            for axes, key in ((accuracy, f"val_{metric}"), (loss, "train_loss")):
                points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
                if not points:
                    continue
                epochs, values = zip(*points, strict=True)
                final = f"{values[-1]:.1%}" if axes is accuracy else f"{values[-1]:.3g}"
                axes.plot(
                    epochs,
                    values,
                    label=f"{name}  {final}",
                    color=look["color"],
                    linestyle=look["linestyle"],
                    linewidth=1.8,
                    marker="o" if len(points) == 1 else None,
                )
        for label, value in (teachers or {}).items():
            accuracy.axhline(
                value, label=f"{label}  {value:.1%}", color="0.35", linestyle="--", linewidth=1.2
            )
        if title:
            figure.suptitle(title)
        printed = HEADLINES[metric]
        accuracy.set(title=f"Validation {printed}", xlabel="epoch", ylabel=printed)
        accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
        loss.set(title="Training loss", xlabel="epoch", ylabel="loss")
        for axes in (accuracy, loss):
            axes.grid(alpha=0.3, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if axes.lines:
                # Below the axes, where it covers no curve.
                axes.legend(
                    loc="upper left",
                    bbox_to_anchor=(0, -0.13),
                    frameon=False,
                    title="last epoch",
                    alignment="left",
                )
        with atomic_path(Path(path)) as beside:
            figure.savefig(beside, format="png", dpi=150)
