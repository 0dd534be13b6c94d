"""Honest clocks: both sides interleaved in one process, after a green correctness gate.

`pytest benchmarks/bench_X.py` prints a table and writes results/<what>_<hardware>.{json,md}
when asked to with --save-results.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--save-results` keeps the table; without it a run only prints."""
    parser.addoption("--save-results", action="store_true", help="write benchmarks/results/")
    parser.addoption("--pairs", type=int, default=20, help="interleaved repetitions (20 or more)")
    parser.addoption("--peer-path", help="folder with checkouts of peers that no registry has")


def cpu_name() -> str:
    """The processor, its widest vectors (one name is sold in several generations), its cores."""
    from fastkd.cli.doctor import cpu_facts

    facts = cpu_facts()
    vectors = facts["instructions"].lower() + (" bf16" if facts["bf16"] else "")
    return f"{facts['name']}, {vectors}, {facts['cores']} cores"


def environment() -> dict[str, Any]:
    """Hardware, versions and load: what a number means nothing without."""
    from fastkd.kernels import status

    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 1),
        "kernels": status(),
        "commit": commit(),
        "command": "pytest " + " ".join(a for a in sys.argv[1:]),
    }


def commit() -> str:
    """Short hash of the checkout, "+" appended when it has changes; "unknown" outside of git."""
    root = Path(__file__).parent
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return (name.stdout.strip() or "unknown") + ("+" if dirty.stdout.strip() else "")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """pytest-benchmark's own JSON carries the same facts."""
    machine_info["fastkd"] = environment()


@dataclass
class Table:
    """Rows of one benchmark file, printed at its end."""

    what: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """A GitHub table; floats with three significant digits."""
        names = list(self.rows[0]) if self.rows else []
        lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)] if names else []
        for row in self.rows:
            cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """Collects rows; prints them at the end of the module, and keeps them with --save-results."""
    kept = Table(Path(request.path).stem.removeprefix("bench_"))
    yield kept
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n\n{kept.markdown()}\n")
    if request.config.getoption("--save-results") and kept.rows:
        save(kept)


def save(kept: Table) -> None:
    """Writes <what>_<device>.json and .md."""
    facts = environment()
    device = (facts["gpu"] or cpu_name()).replace(",", "").replace(" ", "-").lower()
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"{kept.what}_{device}"
    stem.with_suffix(".json").write_text(
        json.dumps({"environment": facts, "rows": kept.rows, "notes": kept.notes}, indent=1) + "\n"
    )
    head = [f"# {kept.what}", ""]
    head += [f"- {k}: {v}" for k, v in facts.items() if k != "kernels" and v is not None]
    stem.with_suffix(".md").write_text("\n".join([*head, "", kept.markdown(), ""]))
