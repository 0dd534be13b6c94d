"""pytest-benchmark as a fair clock: the sides of a comparison take turns in one process.

    pytest benchmarks/bench_X.py [--part Y] [--pairs 20] [--save-results] [--benchmark-json FILE]

A benchmark checks that its sides compute the same, then hands them to the fixture `race`.
pytest-benchmark lists the sides of a case beside each other, with every sample in its JSON. The
table printed at the end adds the paired ratios; --save-results writes it and the samples to
results/<what>_<device>.{json,md}. --part Y runs only the functions `bench_Y..` and saves them as
<what>_<Y>. --quick is a rehearsal with few cases and turns; --benchmark-disable runs the checks
alone.
"""

import copy
import ctypes
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.testing import WARM_UP, Spread, speedup, turns

RESULTS = Path(__file__).parent / "results"
ENOUGH_PAIRS = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-results", action="store_true", help="write benchmarks/results/")
    parser.addoption(
        "--pairs",
        type=int,
        default=ENOUGH_PAIRS,
        help=f"turns of the sides; below {ENOUGH_PAIRS} the run is a rehearsal and not saved",
    )
    parser.addoption("--part", default="", help="only the functions bench_PART..")
    parser.addoption("--quick", action="store_true", help="a rehearsal: few cases, 2 turns")
    parser.addoption("--peer-path", help="folder with checkouts of peers that no registry has")


def pytest_configure(config: pytest.Config) -> None:
    keep_freed_memory()
    pairs = pairs_of(config)
    if pairs < 1:
        raise pytest.UsageError(f"--pairs is {pairs}; it must be at least 1")
    if pairs < ENOUGH_PAIRS and config.getoption("--save-results"):
        raise pytest.UsageError(
            f"--save-results needs --pairs {ENOUGH_PAIRS} or more, got {pairs}; "
            "leave out --save-results, --quick or --pairs"
        )


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, up to 1 GiB, as it does in the midst of a training.

    With its defaults a process that computes one block gives its activations back to the kernel
    after every call and pays for each page again: on a virtual machine that doubled the time of
    eager torch. Other allocators have no `mallopt` and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 1 << 30)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--part")
    others = [one for one in items if not one.name.startswith(f"bench_{part}")]
    if others and len(others) == len(items):
        names = sorted({one.name.partition("[")[0].removeprefix("bench_") for one in items})
        raise pytest.UsageError(f"there is no part {part}; choose of {', '.join(names)}")
    config.hook.pytest_deselected(items=others)
    items[:] = [one for one in items if one not in others]
    for item in items:
        # The limit of pyproject.toml is for tests.
        item.add_marker(pytest.mark.timeout(0))


def pairs_of(config: pytest.Config) -> int:
    return 2 if config.getoption("--quick") else int(config.getoption("--pairs"))


def cpu_name() -> str:
    """The processor, its widest vectors (one name is sold in several generations), its cores."""
    from fastkd.compute.machine import cpu_facts

    facts = cpu_facts()
    vectors = facts["instructions"].lower() + (" bf16" if facts["bf16"] else "")
    return f"{facts['name']}, {vectors}, {facts['cores']} cores"


def environment() -> dict[str, Any]:
    """Hardware, versions and load, without which a time says nothing."""
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
        "command": "pytest " + " ".join(sys.argv[1:]),
    }


def commit() -> str:
    """Short hash of the checkout, with a "+" if it has changes; "unknown" outside of git."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        return done.stdout.strip()

    try:
        name, changes = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain")
    except OSError:
        return "unknown"
    return (name or "unknown") + ("+" if changes else "")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """pytest-benchmark's own JSON carries the same facts."""
    machine_info["fastkd"] = environment()


@dataclass
class Table:
    """Rows of one benchmark file, printed at its end, and the samples behind them."""

    what: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def markdown(self) -> str:
        """GitHub tables, a new one where the columns change; floats with three digits."""
        lines: list[str] = []
        for names, rows in itertools.groupby(self.rows, key=list):
            lines += [""] if lines else []
            lines += ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
            for row in rows:
                cells = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()]
                lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])

    def save(self) -> None:
        """Write <what>_<device>.json and .md."""
        facts = environment()
        device = (facts["gpu"] or cpu_name()).replace(",", "").replace(" ", "-").lower()
        RESULTS.mkdir(exist_ok=True)
        stem = RESULTS / f"{self.what}_{device}"
        # No indentation: it would give every sample a line of its own.
        content = {"environment": facts, "rows": self.rows, "notes": self.notes}
        text = json.dumps(content | {"seconds": self.seconds})
        stem.with_suffix(".json").write_text(text + "\n")
        head = [f"# {self.what}", ""]
        head += [f"- {k}: {v}" for k, v in facts.items() if k != "kernels" and v is not None]
        stem.with_suffix(".md").write_text("\n".join([*head, "", self.markdown(), ""]))


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """Collects rows; prints them at the end of the module, and saves them with --save-results."""
    part = request.config.getoption("--part")
    kept = Table(Path(request.path).stem.removeprefix("bench_") + (f"_{part}" if part else ""))
    yield kept
    if not kept.rows:
        return
    pairs = pairs_of(request.config)
    if pairs < ENOUGH_PAIRS:
        few = "--quick" if request.config.getoption("--quick") else f"--pairs {pairs}"
        kept.notes.append(f"A rehearsal with {few}: too few turns to compare times.")
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n\n{kept.markdown()}\n")
    if request.config.getoption("--save-results"):
        kept.save()


@dataclass(frozen=True)
class Race:
    """Seconds of every side, one sample a turn."""

    seconds: dict[str, list[float]]

    def ms(self, side: str) -> float:
        """Median."""
        return 1e3 * statistics.median(self.seconds[side])

    def ratio(self, over: str, of: str = "fastkd") -> Spread:
        """time(over) / time(of), paired by turn."""
        return speedup(self.seconds, over, of)

    def cells(self, of: str = "fastkd") -> dict[str, float]:
        """Cells of a row: the median of every side, and the time of the others over `of`'s."""
        found = {f"{side} ms": self.ms(side) for side in self.seconds}
        for over in self.seconds:
            if over != of:
                ratio = self.ratio(over, of)
                found |= {f"vs {over}": ratio.median, f"p10 vs {over}": ratio.p10}
        return found


@pytest.fixture
def race(benchmark: Any, table: Table, request: pytest.FixtureRequest) -> Callable[..., Race]:
    """The one clock: pytest-benchmark times the sides in turns, in one process.

    `race(sides, of="fastkd", repeat=1)`: a call of a side is one sample; `of` is the side that the
    ratios in `extra_info` divide by; `repeat` multiplies --pairs where a call is short.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)

    def run(sides: Mapping[str, Callable[[], Any]], *, of: str = "fastkd", repeat: int = 1) -> Race:
        if benchmark.disabled:
            pytest.skip("the sides agree; --benchmark-disable reads no clock")
        pairs = repeat * pairs_of(request.config)
        order = [*turns(sides, WARM_UP), *turns(sides, pairs)]
        upcoming = itertools.cycle(order)

        def prepare() -> tuple[tuple[Callable[[], Any]], dict[str, Any]]:
            side = sides[next(upcoming)]
            wait()
            return (side,), {}

        def timed(side: Callable[[], Any]) -> None:
            side()
            wait()

        benchmark.pedantic(
            timed,
            setup=prepare,
            warmup_rounds=WARM_UP * len(sides),
            rounds=pairs * len(sides),
        )
        found = Race({side: [] for side in sides})
        timed_order = order[WARM_UP * len(sides) :]
        for side, sample in zip(timed_order, benchmark.stats.stats.data, strict=True):
            found.seconds[side].append(sample)
        list_sides(request.config, benchmark.stats, found, of)
        table.seconds[request.node.name] = found.seconds
        return found

    return run


def list_sides(config: pytest.Config, mixed: Any, found: Race, of: str) -> None:
    """Replace pytest-benchmark's entry for all samples of a case by one for each side."""
    session: Any = config.pluginmanager.getplugin("pytest-benchmark")
    session.benchmarks.remove(mixed)
    for side, samples in found.seconds.items():
        entry = copy.copy(mixed)
        entry.group = mixed.name
        entry.name, entry.fullname = f"{mixed.name} {side}", f"{mixed.fullname} {side}"
        entry.extra_info = {f"time / {of}": found.ratio(side, of)._asdict()}
        entry.stats = type(mixed.stats)()
        for sample in samples:
            entry.update(sample)
        session.benchmarks.append(entry)
