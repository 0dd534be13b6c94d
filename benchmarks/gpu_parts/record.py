"""What a part of gpu.py finds, written to disk at once."""

import json
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import Table, environment

__all__ = ["Job", "Record"]


class Record:
    """A line per finding in OUT/gpu_<part>_<device>.jsonl, and the tables in a page beside it."""

    def __init__(self, out: Path, part: str, rehearsed: bool) -> None:
        facts = {**environment(), **versions(), "command": " ".join(["python", *sys.argv])}
        name = "rehearsal" if rehearsed else facts["gpu"].replace(" ", "-").lower()
        self.stem = out / f"gpu_{part}_{name}"
        self.tables: dict[str, Table] = {}
        self.lines: list[str] = []
        self.lock = threading.RLock()
        self.facts, self.part, self.failed = facts, part, False
        self.stem.with_suffix(".jsonl").write_text("")
        self._write("environment", environment=facts)

    def row(self, table: str, cells: dict[str, Any]) -> None:
        """A line of a table; all lines of a table have the same cells."""
        with self.lock:
            self.tables.setdefault(table, Table(table)).rows.append(cells)
            self._write("row", table=table, **cells)

    def note(self, text: str) -> None:
        """A sentence under the tables."""
        self._say("note", text)

    def short(self, bar: str, found: str) -> None:
        """A bar that this run does not reach."""
        self._say("short", f"{bar}; found {found}")

    def missing(self, what: str) -> None:
        """Something that could not be run, and why."""
        self._say("missing", what)

    def fail(self, what: str) -> None:
        """Something that ran and failed."""
        self.failed = True
        self._say("failed", what)

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Write down a failure and go on with the other cases."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fail(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            if torch.cuda.is_available():
                # After an illegal access nothing can run in this process: this raises and ends it.
                torch.cuda.synchronize()

    def done(self) -> None:
        """Mark the part as complete."""
        self._write("done")
        self._table("complete")

    def _say(self, kind: str, text: str) -> None:
        with self.lock:
            self.lines.append(f"{kind}: {text}")
            self._write(kind, text=text)

    def _write(self, kind: str, **found: Any) -> None:
        line = json.dumps({"kind": kind, **found}, default=str)
        with self.stem.with_suffix(".jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
        self._table("cut short or still running")

    def _table(self, state: str) -> None:
        head = [f"# gpu.py, part {self.part}: {state}", ""]
        head += [f"- {k}: {v}" for k, v in self.facts.items() if v is not None and k != "kernels"]
        body = [f"\n## {name}\n\n{table.markdown()}" for name, table in self.tables.items()]
        text = "\n".join([*head, *body, "", *(f"- {line}" for line in self.lines), ""])
        self.stem.with_suffix(".md").write_text(text)


@dataclass(frozen=True)
class Job:
    """What a part is asked to do."""

    device: torch.device
    rehearse: bool
    assets: Path | None
    record: Record
    deadline: float

    @property
    def impl(self) -> Any:
        """Triton by name in rehearsals, where CPU tensors would take the C++ core."""
        return "triton" if self.rehearse else None

    def seconds_left(self) -> float:
        """Time until the part is cut."""
        return self.deadline - time.monotonic()

    def in_time(self, what: str, needs_s: float) -> bool:
        """Whether there is time for a case; if not, write that down."""
        if self.rehearse or self.seconds_left() > needs_s:
            return True
        self.record.missing(f"{what}: no time was left")
        return False


def versions() -> dict[str, Any]:
    """Versions, clocks and chip, without which a time on a GPU says nothing."""
    try:
        import triton

        found: dict[str, Any] = {"triton": triton.__version__}
    except ImportError:
        found = {"triton": None}
    if not torch.cuda.is_available():
        return found
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm"]
    try:
        asked = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
        found["driver, power limit, clock"] = asked.stdout.strip() or asked.stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        found["driver, power limit, clock"] = f"unknown ({error})"
    chip = torch.cuda.get_device_properties(0)
    return found | {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "chip": f"sm_{chip.major}{chip.minor}, {chip.multi_processor_count} multiprocessors, "
        f"{chip.total_memory / 2**30:.0f} GiB",
    }
