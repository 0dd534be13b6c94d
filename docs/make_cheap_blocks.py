"""Writes docs/cheap_blocks.md and its picture: `python docs/make_cheap_blocks.py`.

The numbers are in benchmarks/results/, from `pytest benchmarks/bench_grouped_pointwise.py --part
picture --save-results`; of several results the newest is taken.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TARGET = ROOT / "docs" / "cheap_blocks.md"
PICTURE = ROOT / "docs" / "images" / "cheap_blocks.png"
MODES = {"training": "training step", "inference": "forward pass in eval mode"}
# Of Okabe and Ito's palette, as in report/plots.py.
SIDES = {"plain": ("#D55E00", "o", "plain modules"), "fastkd": ("#0072B2", "s", "fastkd")}

HEAD = """# Cheap blocks: arithmetic and time

<!-- Made by docs/make_cheap_blocks.py from benchmarks/results/. -->

Moonshine (Crowley, Gray, Storkey 2018, table 1) replaces the 3x3 convolutions of a network by
blocks with a fraction of their arithmetic. The picture has WRN-40-2 at 32 px with every one of
these blocks: the measured time of a training step and of a forward pass over the
multiply-accumulates of a forward pass, both as a share of the dense network's (`S`). On the dashed
line a block takes as little time as its arithmetic promises. Circles are plain modules of torch,
squares the same network with `kernels=auto`, which fuses a block where that is faster; where both
lie on each other, it stays plain.

![Time over arithmetic for all blocks](images/cheap_blocks.png)
"""


def newest(folder: Path = RESULTS) -> dict[str, Any]:
    """The result that was measured last."""
    files = sorted(folder.glob("grouped_pointwise_picture_*.json"))
    if not files:
        raise SystemExit(
            f"there is no grouped_pointwise_picture_*.json in {folder}; run, on a quiet machine, "
            "`pytest benchmarks/bench_grouped_pointwise.py --part picture --save-results`"
        )
    found = [json.loads(file.read_text()) for file in files]
    return max(found, key=lambda one: one["environment"]["date"])


def rows_of(found: Mapping[str, Any], mode: str) -> list[dict[str, Any]]:
    """The rows of a mode, with shares of the arithmetic and time of the dense, plain network."""
    rows = [row for row in found["rows"] if row.get("mode") == mode]
    dense = next(row for row in rows if row["block"] == "S")
    return [
        {
            "block": row["block"],
            "arithmetic": row["MMACs an image"] / dense["MMACs an image"],
            **{side: row[f"{side} ms"] / dense["plain ms"] for side in SIDES},
            **{f"{side} ms": row[f"{side} ms"] for side in SIDES},
            "batch": row["batch"],
        }
        for row in rows
    ]


def page(found: Mapping[str, Any]) -> str:
    """The whole file."""
    facts = found["environment"]
    device = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} threads"
    parts = [HEAD]
    for mode, title in MODES.items():
        rows = rows_of(found, mode)
        parts += [
            f"## {title.capitalize()}, batch {rows[0]['batch']}",
            "",
            "| block | arithmetic | plain ms | fastkd ms | plain / S | fastkd / S |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row in rows:
            times = [f"{row[f'{side} ms']:.3g}" for side in SIDES]
            shares = [f"{row[side]:.0%}" for side in SIDES]
            cells = [row["block"], f"{row['arithmetic']:.1%}", *times, *shares]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    turns = {len(one) for sides in found["seconds"].values() for one in sides.values()}
    parts.append(
        f"Medians of {min(turns)} turns on {device}, torch {facts['torch']}, {facts['date']}, "
        f"commit {facts['commit']}. Every sample is in `benchmarks/results/`.\n"
    )
    return "\n".join(parts)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Two panels, shares of the dense network's time over shares of its arithmetic."""
    with rc_context({"font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(11, 6), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (mode, title) in zip(figure.subplots(1, 2), MODES.items(), strict=True):
            rows = rows_of(found, mode)
            panel(axes, rows)
            axes.set_title(f"WRN-40-2, {title}", pad=58)
            axes.set(
                xlabel="arithmetic, share of the dense network",
                ylabel="time, share of the dense network in plain modules",
            )
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, format="png", dpi=150)


def panel(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """A mode: the promise, the two sides of each block, and what lies between them."""
    x = [row["arithmetic"] for row in rows]
    axes.plot([min(x), 1], [min(x), 1], "--", color="#777777", linewidth=1, label="the promise")
    for row in rows:
        ends = [row[side] for side in SIDES]
        axes.plot([row["arithmetic"]] * 2, ends, "-", color="#bbbbbb", linewidth=0.8, zorder=1)
    for side, (colour, marker, label) in SIDES.items():
        y = [row[side] for row in rows]
        axes.scatter(x, y, s=22, c=colour, marker=marker, label=label, zorder=2)
    # Many blocks have nearly the same arithmetic: their names are spread out above the axes.
    for place, row in enumerate(sorted(rows, key=lambda row: row["arithmetic"])):
        axes.annotate(
            row["block"],
            (row["arithmetic"], max(row[side] for side in SIDES)),
            xytext=((place + 0.5) / len(rows), 1.04),
            textcoords="axes fraction",
            rotation=90,
            ha="center",
            fontsize=7,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.5},
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_minor_formatter(
            lambda value, _: f"{value:.0%}" if f"{value:.0e}"[0] in "25" else ""
        )
    axes.grid(alpha=0.3, linewidth=0.6, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)


def two_and_five(value: float, _: int) -> str:
    """Labels between the powers of ten, as far apart as those."""
    return f"{value:.0%}" if f"{value:.0e}"[0] in "25" else ""


if __name__ == "__main__":
    measured = newest()
    draw(measured, PICTURE)
    TARGET.write_text(page(measured))
