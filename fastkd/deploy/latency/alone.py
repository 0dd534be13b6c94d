"""The program of the script for other devices, and what it shares with fastkd: a report of a file.

Part of that script: onnxruntime, numpy and the standard library. `BATCHES`, `THREADS` and `ON` are
what `fastkd latency --script` was told; the words of the script replace them.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.deploy.latency.host import Neighbours, caveats, machine
from fastkd.deploy.latency.lines import HEADER, layer_lines, notes, row_line, title
from fastkd.deploy.latency.meter import RULE, Rule, clock_name, time_calls
from fastkd.deploy.latency.runtime import (
    PROVIDERS,
    Refused,
    answer_of,
    compare,
    device_of,
    feed_of,
    node_rows,
    provider_missing,
    runs,
    session,
)

__all__ = ["LAYERS_BY", "UNOPTIMIZED", "Asked", "fill", "main", "start_of_report", "taken"]

FORMAT = "fastkd latency 1"
BATCHES: Sequence[int] = (1,)
THREADS: Sequence[int] = (1,)
ON: Sequence[str] = ("ort-cpu",)

LAYERS_BY = "nodes of the optimised graph, by onnxruntime's profiler, which costs some time itself"
UNOPTIMIZED = "onnxruntime without graph optimisation"


def taken(target: Path) -> str | None:
    """Why a new file cannot have this name; None if it can."""
    if os.path.lexists(target):
        return f"{target} exists: remove it, or choose another name"
    return None if target.parent.is_dir() else f"there is no folder {target.parent}"


def start_of_report(
    network: str, rule: Rule, versions: dict[str, str | None], reference: str
) -> dict[str, Any]:
    """A report without rows, with the machine as it is now."""
    return {
        "format": FORMAT,
        "network": network,
        "reference": reference,
        "clock": clock_name(),
        "rule": rule.plain(),
        "machine": machine(),
        "versions": {name: version for name, version in versions.items() if version},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": [],
        "missing": [],
        "caveats": [],
    }


def missing(
    on: str, reason: str, batch: int | None = None, threads: int | None = None, wrong: bool = False
) -> dict[str, Any]:
    """What was not measured, and why; wrong: the command fails for it."""
    return {"on": on, "batch": batch, "threads": threads, "reason": reason, "wrong": wrong}


@dataclass(frozen=True)
class Asked:
    """What to measure: every backend with every batch and number of threads."""

    on: Sequence[str]
    batch: Sequence[int]
    threads: Sequence[int]

    def cases(self, on: str) -> list[tuple[int, int]]:
        """(batch, threads) of a backend; a GPU is measured with one number of threads."""
        gpu = on in PROVIDERS and device_of(on) != "cpu"
        threads = self.threads[:1] if gpu else self.threads
        return [(batch, number) for batch in self.batch for number in threads]


def fill(
    report: dict[str, Any],
    asked: Asked,
    lacks: Callable[[str], str | None],
    row_of: Callable[[str, int, int, Neighbours], dict[str, Any]],
    say: Callable[[dict[str, Any]], None],
) -> None:
    """Measure one case after the other; what cannot be measured is listed, the rest goes on.

    lacks: what a backend lacks. row_of: the row of (backend, batch, threads), or Refused. say: is
    told each row as it is measured.
    """
    neighbours = Neighbours()
    for on in asked.on:
        if reason := lacks(on):
            report["missing"].append(missing(on, reason))
            continue
        for batch, threads in asked.cases(on):
            try:
                row = row_of(on, batch, threads, neighbours)
            except Refused as error:
                report["missing"].append(missing(on, str(error), batch, threads, error.wrong))
                continue
            report["rows"].append(row)
            say(row)
    report["caveats"] = caveats(report["machine"], machine(), neighbours.cores)
    cores, most = report["machine"]["cores"], max(asked.threads)
    if most > cores:
        said = f"{most} threads take turns on {cores} core{'' if cores == 1 else 's'}"
        report["caveats"].append(f"{said}: more threads than cores are slower.")


def file_row(
    file: Path,
    on: str,
    batch: int,
    threads: int,
    *,
    size: tuple[int, int] | None,
    layers: bool,
    neighbours: Neighbours,
) -> dict[str, Any]:
    """One row of an ONNX file in onnxruntime."""
    with session(file, "ort-cpu", 1, optimized=False) as plain:
        feed = feed_of(plain, batch, size)
        truth = answer_of(plain, feed)
    with session(file, on, threads) as opened:
        call = runs(opened, feed)
        difference = compare(answer_of(opened, feed), truth, device_of(on))
        with neighbours:
            timing = time_calls(call, RULE)
    rows = node_rows(file, on, threads, feed, RULE.calls) if layers else []
    (images,) = feed.values()
    return {
        "on": on,
        "input": list(images.shape),
        "threads": threads,
        **timing.plain(),
        "difference": difference,
        "layers": rows,
        "layers_by": LAYERS_BY if rows else None,
    }


def _numbers(text: str) -> list[int]:
    found = [int(word) if word.isdigit() else 0 for word in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers above 0, such as 1,8")
    return found


def _size(text: str) -> tuple[int, int]:
    sides = [int(word) if word.isdigit() else 0 for word in text.split("x")]
    if len(sides) > 2 or not all(sides):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a side or HxW, such as 224 or 96x128")
    return sides[0], sides[-1]


def _backends(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PROVIDERS]:
        known = ", ".join(PROVIDERS)
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected some of {known}")
    return names


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure how long FILE.onnx takes on this device. The JSON is read by: fastkd "
        "latency --read FILE.json"
    )
    parser.add_argument("file", metavar="FILE.onnx", type=Path)
    parser.add_argument("--batch", type=_numbers, default=list(BATCHES), metavar="1,8")
    parser.add_argument("--threads", type=_numbers, default=list(THREADS), metavar="1,2")
    parser.add_argument("--on", type=_backends, default=list(ON), metavar=",".join(PROVIDERS))
    parser.add_argument("--size", type=_size, metavar="N|HxW", help="of images, if the file asks")
    parser.add_argument("--layers", action="store_true", help="also the time of each node")
    parser.add_argument("--json", type=Path, help="default: FILE.json", metavar="OUT.json")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if an answer was wrong or nothing was measured, 2 if the name of
    the result is taken.
    """
    options = _options(words)
    target = options.json or options.file.with_suffix(".json")
    if reason := taken(target):
        print(f"{reason} (--json OUT.json)", file=sys.stderr)
        return 2
    versions: dict[str, str | None] = {"python": platform.python_version(), "numpy": np.__version__}
    if "onnxruntime" in sys.modules or provider_missing("ort-cpu") is None:
        import onnxruntime

        versions["onnxruntime"] = onnxruntime.__version__
    report = start_of_report(options.file.name, RULE, versions, UNOPTIMIZED)
    print("\n".join([*title(report), HEADER]))

    def row_of(on: str, batch: int, threads: int, neighbours: Neighbours) -> dict[str, Any]:
        how = {"size": options.size, "layers": options.layers, "neighbours": neighbours}
        return file_row(options.file, on, batch, threads, **how)

    asked = Asked(options.on, options.batch, options.threads)
    fill(report, asked, provider_missing, row_of, lambda row: print(row_line(row), flush=True))
    for row in report["rows"]:
        print("".join(f"{line}\n" for line in layer_lines(row)), end="")
    print("\n".join(notes(report)))
    if report["rows"]:
        with target.open("x", encoding="utf-8") as file:  # never one that appeared meanwhile
            file.write(json.dumps(report, indent=1) + "\n")
        print(f"Written: {target}")
    return int(not report["rows"] or any(one["wrong"] for one in report["missing"]))
