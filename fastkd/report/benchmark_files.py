"""Accuracies in the JSON files of benchmarks/results: groups of seeds, each with its baseline.

Flow: `fastkd.report.leaderboard` lists them below the rows of papers, named as what they are. A
file has `command` and `rows`; a row has a `seed`, a metric, and by whatever else it is told apart.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.evaluation.headline import HEADLINES
from fastkd.printable import shown
from fastkd.report.gains import Gain, paired

__all__ = ["Benchmark", "Measured", "read_benchmark"]

_DIGITS = "The handwritten digits that scikit-learn ships: 300 training and 1,497 validation images"
_JPEG = (
    "CIFAR-10 as JPEG (quality 75, lossy: a network that scores 93.4 % on the original pixels "
    "scores 83.2 % on these)"
)
# What a file measured, in words that the file itself does not have.
_ABOUT = {
    "quickstart_seeds": ("Quickstart", f"{_DIGITS}, in fp32. No paper."),
    "quickstart_seeds_bf16": ("Quickstart in bf16", f"{_DIGITS}. No paper."),
    "cifar10_methods": (
        "Methods on JPEG CIFAR-10",
        f"{_JPEG}; 5,000 of the training images, 10 epochs. Neither the papers' data nor their "
        f"budget: it shows that every method learns, not which one is best.",
    ),
    "cycle_cifar10": (
        "Repeated views on JPEG CIFAR-10",
        f"{_JPEG}; 5,000 of the training images. No paper.",
    ),
    "precision_cifar10": (
        "Precision on JPEG CIFAR-10",
        f"{_JPEG}; part of the training images, few epochs. No paper.",
    ),
    "block_cifar10": (
        "The fused block on JPEG CIFAR-10",
        f"{_JPEG}; a short training. No paper.",
    ),
    "segmentation_camvid": (
        "Segmentation on CamVid",
        "CamVid, a short training. No number of a paper.",
    ),
}
# In a row, but nothing that tells groups apart.
_ASIDE = ("seed", "params", "macs", "epochs", "pixel_accuracy")


@dataclass(frozen=True)
class Measured:
    """One group: what a method reached with several seeds."""

    name: str
    values: tuple[float, ...]
    """Shares of 1, by seed."""
    gain: Gain | None
    """Over its baseline by seed; None without one."""

    @property
    def mean(self) -> float:
        """Of all seeds."""
        return statistics.mean(self.values)

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None of one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Benchmark:
    """One file."""

    file: Path
    title: str
    about: str
    command: str
    metric: str
    """A key of HEADLINES."""
    groups: tuple[Measured, ...]


def read_benchmark(file: Path) -> Benchmark:
    """UserError for a file without accuracies of seeds, such as one of times."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        rows = [dict(row) for row in facts["rows"]]
        by_seed = _by_group(rows)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(
            f"{shown(file)} has no accuracies by seed: expected a JSON file of benchmarks/results "
            f"with rows of seed and {', '.join(HEADLINES)}"
        ) from None
    title, about = _ABOUT.get(file.stem, (file.stem.replace("_", " "), ""))
    groups = [
        Measured(name, tuple(values.values()), _gain(name, by_seed))
        for name, values in by_seed.items()
    ]
    command = str(facts.get("command", ""))
    return Benchmark(file, title, about, command, _metric(rows[0]), tuple(groups))


def _metric(row: Mapping[str, Any]) -> str:
    return next((name for name in HEADLINES if name in row), "accuracy")


def _by_group(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Values by seed, by the name of the group."""
    found: dict[str, dict[int, float]] = {}
    if "distilled" in rows[0]:
        # One row a seed, with a column for each network.
        for name in ("teacher", "alone", "distilled"):
            found[name] = {int(row["seed"]): float(row[name]) for row in rows}
        return found
    metric = _metric(rows[0])
    for row in rows:
        found.setdefault(_name(row, metric), {})[int(row["seed"])] = float(row[metric])
    return found


def _name(row: Mapping[str, Any], metric: str) -> str:
    words: list[str] = []
    for key, value in row.items():
        if key in _ASIDE or key == metric or not isinstance(value, str | int | None):
            continue
        words.append(str(value) if key == "method" else f"{key} {value or 'none'}")
    return ", ".join(words)


def _gain(name: str, by_seed: Mapping[str, Mapping[int, float]]) -> Gain | None:
    base = _baseline(name, by_seed)
    if base is None:
        return None
    own, other = by_seed[name], by_seed[base]
    return paired([own[seed] - other[seed] for seed in own if seed in other])


def _baseline(name: str, names: Mapping[str, Any]) -> str | None:
    """`resnet20, alone` for `resnet20-G(4), AT`; no cycle for any cycle; None for a baseline."""
    if name == "distilled":
        return "alone"
    if name.startswith("cycle "):
        return "cycle none" if name != "cycle none" and "cycle none" in names else None
    method, _, rest = name.partition(", ")
    for other in names:
        base, _, alone = other.partition(", ")
        # What follows, such as the precision, is the same.
        tail = rest.partition(", ")[2]
        if alone == ", ".join(filter(None, ("alone", tail))) and method.startswith(base):
            return other if other != name else None
    return None
