"""Interleaved timing of several sides of a comparison, and the files that keep the outcome.

A ratio is taken round by round, both sides a moment apart in one process, so that what else the
machine does hits both; its median and 10th and 90th percentile are reported, never bare seconds.
"""

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fastkd.report.run_folder import environment

RESULTS = Path(__file__).parent / "results"


def compare(
    sides: Mapping[str, Callable[[], Any]], subject: str, *, rounds: int, items: int
) -> list[dict[str, Any]]:
    """Time every side once a round, in random order; a row per side with its ratio to `subject`.

    ratio > 1 means that `subject` is faster. items: per call, for the rate.
    """
    order, shuffle = list(sides), random.Random(0)
    for side in order:
        sides[side]()
    seconds: dict[str, list[float]] = {side: [] for side in order}
    for _ in range(rounds):
        shuffle.shuffle(order)
        for side in order:
            start = time.perf_counter()
            sides[side]()
            seconds[side].append(time.perf_counter() - start)
    rows = []
    for side in sides:
        ratios = [a / b for a, b in zip(seconds[side], seconds[subject], strict=True)]
        tenths = statistics.quantiles(ratios, n=10)
        rows.append(
            {
                "side": side,
                "median_ms": 1e3 * statistics.median(seconds[side]),
                "items_per_s": items / statistics.median(seconds[side]),
                "ratio": statistics.median(ratios),
                "ratio_p10": tenths[0],
                "ratio_p90": tenths[-1],
            }
        )
    return rows


def write_results(
    request: pytest.FixtureRequest, name: str, case: str, rows: list[dict[str, Any]], **facts: Any
) -> None:
    """Print a case; with --write-results also merge it into results/<name>.json and .md."""
    title = f"{name}: {case}"
    lines = [
        "| side | median ms | items/s | ratio to subject | p10 | p90 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['side']} | {row['median_ms']:.1f} | {row['items_per_s']:.0f} | "
            f"{row['ratio']:.2f} | {row['ratio_p10']:.2f} | {row['ratio_p90']:.2f} |"
        )
    print("\n".join(["", title, *lines]))
    if not request.config.getoption("--write-results"):
        return
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    known["cases"][case] = {"rows": rows, **facts, "markdown": lines}
    known["environment"] = machine = environment()
    known["command"] = "pytest benchmarks/" + Path(str(request.path)).name + " --write-results"
    path.write_text(json.dumps(known, indent=1) + "\n")
    text = [
        f"# {name}",
        "",
        f"`{known['command']}`",
        "",
        f"{machine['time']}, {machine['cpu']['name']}, {machine['threads']} threads, torch "
        f"{machine['torch']}, fastkd {machine['fastkd']}. A ratio above 1 says how many times "
        "faster the subject (ratio 1.00) is; median, 10th and 90th percentile over interleaved "
        "rounds in one process.",
    ]
    for each, found in known["cases"].items():
        text += ["", f"## {each}", "", *found["markdown"]]
    (RESULTS / f"{name}.md").write_text("\n".join(text) + "\n")
