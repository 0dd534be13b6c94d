"""What layers and networks cost on the target: measured once, kept in a file of JSON lines.

    {"format": "fastkd costs 1", "target": {"on": "ort-cpu", "threads": "1", "cpu": .., ..}}
    {"key": "6f..", "label": "block 32->32 at 32x32", "block": "G(4)", "p10_ms": .., ..}

The first line says where it was measured. A table of another machine, runtime, version, batch or
number of threads is refused: times do not carry over. A line that was cut short by a kill, or is
damaged, is measured again.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import fastkd
from fastkd.compute.machine import version_of
from fastkd.deploy.latency import QUICK, RULE, Latency, Rule, measure
from fastkd.deploy.latency.host import machine
from fastkd.errors import RunFailed, UserError
from fastkd.printable import shown
from fastkd.storage.atomic import append_line, sentence

__all__ = ["Meter", "RuntimeMeter", "Table", "Times"]

_FORMAT = "fastkd costs 1"


@dataclass(frozen=True)
class Times:
    """Milliseconds of a call."""

    p10_ms: float
    p50_ms: float
    p90_ms: float


class Meter(Protocol):
    """Measures on the target."""

    @property
    def target(self) -> Mapping[str, str]:
        """Everything that decides a time beside the network."""
        ...

    def layer(self, module: nn.Module, shape: tuple[int, ...]) -> Times:
        """Of a part of a network; shape: of its input, without the batch."""
        ...

    def whole(self, network: nn.Module | Path, shape: tuple[int, ...]) -> Times:
        """Of a network, or of an ONNX file; with its answer compared first."""
        ...


@dataclass(frozen=True)
class RuntimeMeter:
    """`fastkd latency`, on one backend of this machine."""

    on: str = "ort-cpu"
    threads: int = 1
    batch: int = 1
    layer_rule: Rule = QUICK
    rule: Rule = RULE

    @property
    def target(self) -> dict[str, str]:
        """Backend, threads, batch, processor, versions. Not the name of the host: containers change
        theirs."""
        runtimes = {"openvino": ["openvino"], "eager": [], "compile": []}
        names = runtimes.get(self.on, ["onnxruntime", "onnxruntime-gpu"])
        here = machine()
        versions = {name: version for name in names if (version := version_of(name))}
        return {
            "on": self.on,
            "threads": str(self.threads),
            "batch": str(self.batch),
            "cpu": here["cpu"],
            "cores": str(here["cores"]),
            "fastkd": fastkd.__version__,
            "torch": torch.__version__,
            **versions,
        }

    def layer(self, module: nn.Module, shape: tuple[int, ...]) -> Times:
        """By `QUICK`; what is measured is not compared, for thousands of them."""
        return self._measured(module, shape, self.layer_rule, check=False)

    def whole(self, network: nn.Module | Path, shape: tuple[int, ...]) -> Times:
        """By `RULE`."""
        return self._measured(network, shape, self.rule, check=True)

    def _measured(
        self, network: nn.Module | Path, shape: tuple[int, ...], rule: Rule, *, check: bool
    ) -> Times:
        found: Latency = measure(
            network,
            (self.batch, *shape),
            self.on,
            threads=self.threads,
            rule=rule,
            check=check,
        )
        return Times(found.p10_ms, found.p50_ms, found.p90_ms)


class Table:
    """Times by key; `put` writes one at once."""

    def __init__(self, file: Path, target: Mapping[str, str]) -> None:
        self.file = file
        self.rows: dict[str, dict[str, Any]] = {}
        lines = _lines(file)
        if not lines:
            append_line(file, json.dumps({"format": _FORMAT, "target": dict(target)}))
            return
        head, *rows = lines
        if head.get("format") != _FORMAT or not isinstance(head.get("target"), dict):
            raise UserError(f"{shown(file)} is no table of fastkd compress: choose another --out")
        there = head["target"]
        if other := [key for key in {**there, **target} if there.get(key) != target.get(key)]:
            said = ", ".join(f"{key} {there.get(key)}, here {target.get(key)}" for key in other)
            raise UserError(
                f"{shown(file)} was measured elsewhere ({said}), and times do not carry over: "
                f"choose another --out, or go on there"
            )
        self.rows = {row["key"]: row for row in rows if _time(row)}

    def get(self, key: str) -> Times | None:
        """None if it was not measured yet."""
        row = self.rows.get(key)
        return None if row is None else Times(row["p10_ms"], row["p50_ms"], row["p90_ms"])

    def put(self, key: str, times: Times, **more: Any) -> Times:
        """Keep a time."""
        if not times.p50_ms >= 0:
            raise RunFailed(f"{more.get('label', key)}: the clock said {times.p50_ms} ms")
        row = {"key": key, **more, **asdict(times)}
        append_line(self.file, json.dumps(row))
        self.rows[key] = row
        return times


def _time(row: Mapping[str, Any]) -> bool:
    """Whether a row is a time of something."""
    times = [row.get(field.name) for field in fields(Times)]
    return isinstance(row.get("key"), str) and all(
        isinstance(one, int | float) and 0 <= one < math.inf for one in times
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    """The rows of the complete lines, one empty for a line that is damaged."""
    if not file.exists():
        return []
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunFailed(sentence(error)) from error
    found: list[dict[str, Any]] = []
    for line in text.split("\n")[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = {}
        found.append(row if isinstance(row, dict) else {})
    return found
