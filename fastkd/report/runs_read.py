"""Run folders as `fastkd report` reads them: finished or not, one by one or whole trees of them.

Flow: `read_runs` finds the folders and reads their text files; the figures take what they need of a
`ReportedRun`. Nothing is loaded that needs torch.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.config.plain_yaml import MAX_LENGTH, NotPlain, read_yaml
from fastkd.errors import UserError
from fastkd.evaluation.headline import headline
from fastkd.output.call_record import is_call
from fastkd.output.run_folder import FACTS, RECORD, RunFolder, whole_rows
from fastkd.printable import in_words, shown

__all__ = ["RECORD", "ReportedRun", "last_and_best", "read_run", "read_runs"]


@dataclass(frozen=True)
class ReportedRun:
    """What a run folder says."""

    path: Path
    name: str
    """Of the recipe."""
    recipe: dict[str, Any]
    """config.yaml, by sections."""
    summary: dict[str, Any] | None
    """None for an unfinished run."""
    history: list[dict[str, Any]]
    """Rows of metrics.jsonl."""
    facts: dict[str, Any]
    """facts.json; empty where there is none."""
    environment: dict[str, Any]
    """environment.json; empty where there is none."""
    label: str
    """What tells the run from the others of a report."""
    group: str = ""
    """The label without the seed: runs that are equal in it differ in their seeds alone."""
    alone: Path | None = None
    """Folder of the student alone that the run is measured by."""
    predictions: Mapping[str, Path] = field(default_factory=dict)
    """Files of kept answers to the validation images, by `student`, `alone` and `teacher`."""
    last_layers: Path | None = None
    """File of what `fastkd.runs.activations` kept for a t-SNE."""

    @property
    def finished(self) -> bool:
        """Whether the run reached its last epoch."""
        return self.summary is not None

    @property
    def metric(self) -> str:
        """A key of HEADLINES: what the run is judged by."""
        return headline(self.summary or (self.history[-1] if self.history else {}))

    @property
    def of_distill(self) -> bool:
        """Whether `fastkd.distill` made it: config.yaml is then no recipe."""
        return is_call(self.recipe)

    def key(self, dotted: str, default: Any = None) -> Any:
        """A value of the recipe, such as `optim.lr`; the default where the file does not say it."""
        found: Any = self.recipe
        for part in dotted.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found

    def last_and_best(self) -> tuple[float | None, float | None]:
        """The headline metric in the last epoch so far and in the best one, shares of 1."""
        return last_and_best(self.history, self.metric)

    def recorded(
        self, name: str
    ) -> "list[dict[str, Any]] | dict[int, dict[str, np.ndarray]] | None":
        """What `report.record=NAME` kept; None where the run has none of it.

        record/NAME.jsonl: its rows, up to one that a kill cut short. record/NAME-epochNNNN.npz:
        the arrays of every such file by epoch, in order; a damaged file is left out with a warning.
        """
        folder = self.path / RECORD
        rows = folder / f"{name}.jsonl"
        if rows.exists():
            return whole_rows(rows)
        found: dict[int, dict[str, np.ndarray]] = {}
        for file in sorted(folder.glob(f"{name}-epoch*.npz")):
            match = re.fullmatch(rf"{re.escape(name)}-epoch(\d+)\.npz", file.name)
            if match is None:
                continue
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    found[int(match[1])] = dict(arrays)
            except Exception as error:  # a zip file that a kill cut short fails in many ways
                warnings.warn(f"{file} is damaged ({in_words(error)}): left out", stacklevel=2)
        return found or None


def last_and_best(
    history: Iterable[Mapping[str, Any]], metric: str
) -> tuple[float | None, float | None]:
    """`val_METRIC` of the last row that has it, and the largest; None without such a row."""
    key = f"val_{metric}"
    values = [row[key] for row in history if row.get(key) is not None]
    return (values[-1], max(values)) if values else (None, None)


def read_runs(paths: Sequence[Path | str]) -> list[ReportedRun]:
    """The runs that the paths name, each once, in this order; unfinished ones too.

    paths: run folders, and folders with run folders at any depth, as a sweep leaves them. A run's
    own baselines, in its folder, are no runs of the report. Files beside them, such as the CSV
    table of a sweep, are passed over. A folder that cannot be read is named in a warning and left
    out.

    Raises:
        UserError: a path does not exist, or there is no run below any of them.
    """
    found: dict[Path, ReportedRun] = {}
    for path in map(Path, paths):
        if path.is_file():
            continue  # the shell's runs/RECIPE/* also finds the table of a sweep
        if not path.exists():
            raise UserError(f"there is no run folder {shown(path)}")
        for folder in _folders(path):
            if folder.resolve() in found:
                continue
            try:
                found[folder.resolve()] = read_run(folder)
            except UserError as error:
                warnings.warn(f"{error}: left out of the report", stacklevel=2)
    if not found:
        where = ", ".join(shown(path) for path in paths)
        raise UserError(
            f"there is no run to report on in {where}: name run folders, or a folder of runs such "
            f"as runs/"
        )
    return _told_apart(list(found.values()))


def read_run(folder: Path) -> ReportedRun:
    """One run folder.

    Raises:
        UserError: it is no run folder, or a file in it is damaged.
    """
    run = RunFolder.open(folder)
    recipe = _recipe(folder / "config.yaml")
    summary = run.summary()
    return ReportedRun(
        path=folder,
        name=str(recipe.get("name") or (summary or {}).get("recipe") or folder.name),
        recipe=recipe,
        summary=summary,
        history=run.metrics(),
        facts=_mapping(folder / FACTS),
        environment=_mapping(folder / "environment.json"),
        label=folder.name,
    )


def _folders(path: Path) -> list[Path]:
    """Run folders at or below a path, by name; nothing inside of a run folder."""
    if (path / "config.yaml").exists():
        return [path]
    inside = sorted(one for one in path.iterdir() if one.is_dir() and not one.is_symlink())
    return [found for one in inside for found in _folders(one)]


def _recipe(file: Path) -> dict[str, Any]:
    try:
        with file.open(encoding="utf-8-sig") as text:
            values = read_yaml(text.read(MAX_LENGTH + 1))
    except (OSError, NotPlain, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({in_words(error)})") from None
    if not isinstance(values, Mapping):
        raise UserError(f"{file} is damaged: it is no mapping of keys")
    return dict(values)


def _mapping(file: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none. UserError if it is damaged."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({in_words(error)})") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged: it is no mapping")
    return found


def _told_apart(runs: list[ReportedRun]) -> list[ReportedRun]:
    """With the shortest paths that differ as labels, for runs that nothing else tells apart."""
    depth, longest = 1, max(len(run.path.parts) for run in runs)
    while depth < longest:
        names = ["/".join(run.path.parts[-depth:]) for run in runs]
        if len(set(names)) == len(runs):
            break
        depth += 1
    return [replace(run, label="/".join(run.path.parts[-depth:])) for run in runs]
