"""The folder of one run: its files, written so that a crash at any moment leaves them intact.

Flow: `runs.folders` creates or reopens it on rank 0; the trainer appends metrics; `finish` closes
it.

    runs/<recipe>/<UTC time>-<digest8>/      or the folder that `out=` names
        config.yaml environment.json         when it is created
        facts.json                           likewise: its data and network (`run_facts`)
        metrics.jsonl                        one row per epoch
        last.pt best.safetensors             by the trainer (`save`, `_keep_best`)
        metrics.csv summary.json             when the run is finished
        curves.png predictions.png           likewise, by `report`; the second of labelled pixels
        record/NAME.jsonl                    what `report.record=NAME` keeps: one row per epoch,
        record/NAME-epochNNNN.npz            or arrays of an epoch
        trackers.json                        by `trackers`, if the run is tracked
        tensorboard/ wandb/                  what these two trackers keep

Text files are written next to their final place, flushed to the disk and renamed; metrics.jsonl
grows by whole lines, and a resumed run writes it anew from its checkpoint. A folder without
summary.json is unfinished.
"""

import csv
import io
import json
import math
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from fastkd.errors import RunFailed, UserError
from fastkd.output.trackers.record import TRACKERS_FILE
from fastkd.output.trackers.sink import Ending, TrackedRun, TrackerName
from fastkd.output.trackers.tracking import Tracking
from fastkd.storage.atomic import (
    FULL,
    append_line,
    atomic_path,
    remove_leftovers,
    sentence,
    writing,
)

__all__ = [
    "FACTS",
    "LOCK",
    "PICTURES",
    "RECORD",
    "SUMMARY",
    "WITHOUT_SUMMARY",
    "RunFolder",
    "csv_text",
    "find_finished",
    "find_resumable",
    "title_of_run",
    "whole_rows",
]

_TIME_FORMAT = "%Y%m%dT%H%M%SZ"
FACTS = "facts.json"
SUMMARY = "summary.json"
PICTURES = ("curves.png", "predictions.png")
"""What `report` may draw."""
RECORD = "record"
"""Folder of what `report.record` keeps."""
LOCK = ".lock"
"""Of the process that is using the folder (`occupancy`)."""
WITHOUT_SUMMARY = "Remove it, and the resumed run writes it anew"
_DESCRIPTION = ("config.yaml", "environment.json", FACTS, TRACKERS_FILE)
# Folders of trackers that have the same name here. Without a row they have nothing to show.
_OF_TRACKERS = ("tensorboard", "wandb")
# A folder with any of these is a run folder.
_OUR_FILES = ("config.yaml", "environment.json", "metrics.jsonl", "last.pt", SUMMARY)


@dataclass(frozen=True)
class RunFolder:
    """One run's folder. All writing is rank 0's."""

    path: Path
    tracking: Tracking | None = None
    """Who else is shown the run."""

    @classmethod
    def create(
        cls, root: Path | str, recipe_name: str, digest: str, *, out: Path | str | None = None
    ) -> "RunFolder":
        """Make a new folder: `out`, or one below `root` named by time and digest.

        Raises:
            UserError: `out` has files in it, is a file, or cannot be made.
            RunFailed: the disk is full.
        """
        try:
            if out is not None:
                path = Path(out)
                if path.is_dir() and any(path.iterdir()):
                    raise UserError(
                        f"the run folder {path} exists and is not empty: resume it with "
                        f"--resume {quote(str(path))}, or choose another name for out="
                    )
                path.mkdir(parents=True, exist_ok=True)
                return cls(path)
            return cls(_make_dated(Path(root) / recipe_name, digest))
        except OSError as error:
            place = Path(out if out is not None else root)
            if error.errno in FULL:
                raise RunFailed(sentence(error, place)) from error
            raise UserError(
                f"the run folder {place} cannot be made: {error.strerror}; choose another one "
                f"with out="
            ) from None

    @classmethod
    def open(cls, path: Path | str) -> "RunFolder":
        """An existing run folder, or an empty one.

        Raises:
            UserError: there is no such folder, or it holds something else.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"there is no run folder {path}")
        names = {entry.name for entry in path.iterdir()} - {LOCK}
        if names and names.isdisjoint(_OUR_FILES):
            raise UserError(f"{path} is not a run folder: it has none of {', '.join(_OUR_FILES)}")
        return cls(path)

    def write_text(self, name: str, text: str) -> Path:
        """Write one file atomically; RunFailed where the disk refuses."""
        target = self.path / name
        with atomic_path(target) as beside:
            beside.write_text(text, encoding="utf-8")
        return target

    def write_json(self, name: str, value: Any) -> Path:
        """Write `value` as JSON; non-finite numbers become null, paths and the like text."""
        return self.write_text(name, json.dumps(_plain(value), indent=1) + "\n")

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; RunFailed where the disk refuses."""
        append_line(self.path / "metrics.jsonl", json.dumps(_plain(row)))
        if self.tracking:
            self.tracking.row(row)

    def tracked(
        self,
        names: Sequence[TrackerName],
        *,
        name: str,
        config: Mapping[str, Any],
        stage: str = "student",
        group: str | None = None,
    ) -> "RunFolder":
        """The same folder, shown to these trackers from `begin_tracking` on.

        name: of the recipe. group: by default the stages of this run.
        """
        if not names:
            return self
        title = title_of_run(name, self.path)
        run = TrackedRun(self.path, title, group or title, stage, _plain(config))
        return RunFolder(self.path, Tracking(run, names))

    def begin_tracking(self, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """Start the trackers, or continue where they were; lines for the user.

        history: the rows of the run so far.
        """
        return self.tracking.begin(history) if self.tracking else []

    def end_tracking(self, ending: Ending) -> None:
        """Tell trackers that are not finished that the run has ended before its time."""
        if self.tracking:
            self.tracking.close(ending)

    def metrics(self) -> list[dict[str, Any]]:
        """The complete rows of metrics.jsonl, up to a line that was cut short by a kill."""
        return whole_rows(self.path / "metrics.jsonl")

    def set_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Make metrics.jsonl these rows, as a checkpoint knows them; RunFailed as above."""
        self.write_text("metrics.jsonl", _lines(rows))

    def append_record(self, name: str, row: Mapping[str, Any]) -> None:
        """Add one line to record/NAME.jsonl; RunFailed where the disk refuses."""
        append_line(self._record() / f"{name}.jsonl", json.dumps(_plain(row)))

    def write_record(self, name: str, epoch: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write record/NAME-epochNNNN.npz; RunFailed where the disk refuses."""
        target = self._record() / f"{name}-epoch{epoch:04d}.npz"
        named: dict[str, Any] = dict(arrays)
        with atomic_path(target) as beside, beside.open("wb") as file:
            np.savez_compressed(file, **named)

    def cut_records(self, epochs: int) -> None:
        """Remove what record/ has of later epochs than a checkpoint; RunFailed as above."""
        folder = self.path / RECORD
        with writing(folder):
            for file in sorted(folder.glob("*.jsonl")):
                kept = [row for row in whole_rows(file) if row.get("epoch", 0) <= epochs]
                self.write_text(f"{RECORD}/{file.name}", _lines(kept))
            for file in sorted(folder.glob("*.npz")):
                match = re.search(r"-epoch(\d+)\.npz$", file.name)
                if match is not None and int(match[1]) > epochs:
                    file.unlink()

    def _record(self) -> Path:
        folder = self.path / RECORD
        with writing(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def write_csv(self) -> Path:
        """metrics.csv from metrics.jsonl."""
        return self.write_text("metrics.csv", csv_text(self.metrics()))

    def finish(self, summary: Mapping[str, Any], table: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write metrics.csv, then summary.json, which marks the run as finished.

        The CSV repeats metrics.jsonl: where it cannot be written, a warning says so. RunFailed if
        the summary cannot be. table: rows of the closing table, for trackers.
        """
        try:
            self.write_csv()
        except RunFailed as error:
            warnings.warn(str(error), stacklevel=2)
        self.write_json(SUMMARY, summary)
        remove_leftovers(self.path)
        if self.tracking:
            # Last: the results are safe, however long an upload takes.
            pictures = [path for name in PICTURES if (path := self.path / name).exists()]
            self.tracking.finish(summary, pictures, table)

    def discard(self, root: Path | str) -> None:
        """Remove the folder if it holds no results, and its parents below `root` if empty.

        A checkpoint, a metric row, finished baselines or a foreign file keep it.
        """
        # wandb has links to folders.
        every = [path for path in self.path.rglob("*") if path.is_file() or path.is_symlink()]
        if any(self._is_result(path) for path in every):
            return
        # Nothing but these files, whatever another process writes meanwhile.
        for one in every:
            one.unlink(missing_ok=True)
        inside = sorted((path for path in self.path.rglob("*") if path.is_dir()), reverse=True)
        for folder in (*inside, self.path):
            with suppress(OSError):
                folder.rmdir()
        for parent in self.path.parents:
            if Path(root) not in (parent, *parent.parents):
                return
            try:
                parent.rmdir()
            except OSError:
                return  # the parent holds other runs

    def _is_result(self, file: Path) -> bool:
        """Whether a file is more than a description, a recording or a tracker's first files."""
        described = file.name in _DESCRIPTION
        beside = file.relative_to(self.path).parts[0] in (RECORD, *_OF_TRACKERS)
        return not described and not beside and file.stat().st_size > 0

    def is_of(self, digest: str) -> bool:
        """Whether this is a finished run with this digest."""
        summary = self.summary()
        return summary is not None and summary.get("digest") == digest

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run; None for an unfinished one. UserError if it is damaged."""
        target = self.path / SUMMARY
        if not target.exists():
            return None
        try:
            found = json.loads(target.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise UserError(f"{target} is damaged ({error}). {WITHOUT_SUMMARY}") from None
        if not isinstance(found, dict):
            raise UserError(f"{target} is not a summary of a run. {WITHOUT_SUMMARY}")
        return found


def find_resumable(root: Path | str, recipe_name: str, digest: str) -> RunFolder | None:
    """The newest unfinished run of this recipe and digest below `root`; None if there is none.

    A run in another folder (`out=`) is resumed by naming that folder.
    """
    candidates = (Path(root) / recipe_name).glob(f"*-{digest[:8]}")
    unfinished = [path for path in candidates if not (path / SUMMARY).exists()]
    return RunFolder.open(max(unfinished)) if unfinished else None


def title_of_run(name: str, path: Path) -> str:
    """A run for people: recipe and folder."""
    return f"{name} {path.absolute().name}"


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with a header; columns in the order of their first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def find_finished(root: Path | str, recipe_name: str, digest: str) -> RunFolder | None:
    """The newest finished run of this recipe and digest below `root`, or None."""
    candidates = sorted((Path(root) / recipe_name).glob(f"*-{digest[:8]}"), reverse=True)
    return next((run for path in candidates if (run := RunFolder(path)).is_of(digest)), None)


def whole_rows(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a .jsonl file as rows, up to one that was cut short by a kill.

    Empty if there is no file.
    """
    if not file.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith("\n") or not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(_plain(row)) + "\n" for row in rows)


def _make_dated(parent: Path, digest: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    now = time.time()
    while True:
        path = parent / f"{time.strftime(_TIME_FORMAT, time.gmtime(now))}-{digest[:8]}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            # Two runs of one recipe within a second: names must differ, and sort by age.
            now += 1


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
