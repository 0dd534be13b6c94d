"""The folder of a compression: what was asked, and a file for every phase that is done.

    compress.json     the request; another request in this folder is refused
    costs.jsonl       measured layers and networks (`table`)
    PHASE.json        what a phase found, written when it is done
    runs/             run folders, which resume by themselves
    student.onnx result.json table.md pareto.png

A killed command that is given again reads the files that are there and resumes with the next phase.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from fastkd.errors import Interrupted, UserError
from fastkd.output.run_folder import LOCK, WITHOUT_SUMMARY
from fastkd.printable import few
from fastkd.storage.atomic import atomic_path, writing

__all__ = ["CompressFolder"]

_REQUEST = "compress.json"


class CompressFolder:
    """Opened for one request.

    `check` is for before the folder is locked: that alone changes what is hidden in it.
    """

    def __init__(self, path: Path, request: Mapping[str, Any]) -> None:
        self.path = path
        self.check(path)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        asked = json.loads(json.dumps(dict(request)))
        there = self.read(_REQUEST)
        if there is None:
            self.write(_REQUEST, asked)
        elif there != asked:
            keys = {**there, **asked}
            other = [k for k in keys if there.get(k) != asked.get(k)]
            said = "; ".join(f"{k} {there.get(k)} there, {asked.get(k)} here" for k in other)
            raise UserError(
                f"{path} belongs to another request ({said}): resume it with its own words, or "
                f"choose another folder with --out"
            )

    @staticmethod
    def check(path: Path) -> None:
        """UserError if it is a file, or holds anything that is not of a compression."""
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: choose an empty or new folder with --out")
        if not path.is_dir() or (path / _REQUEST).exists():
            return
        # What a kill before the first file leaves is ours.
        ours = (LOCK, f".{_REQUEST}.tmp")
        if others := [one.name for one in path.iterdir() if one.name not in ours]:
            raise UserError(
                f"{path} holds other files ({few(sorted(others))}): choose an empty or new folder "
                f"with --out"
            )

    def phase(self, name: str, find: Callable[[], Any]) -> Any:
        """What a phase has found, now or before; plain values."""
        file = f"{name}.json"
        found = self.read(file)
        if found is None:
            self.write(file, find())
            found = self.read(file)
        return found

    def read(self, name: str) -> Any:
        """An object of a JSON file; None if it is not there. UserError if it is damaged."""
        file = self.path / name
        if not file.exists():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} is damaged ({error}). {WITHOUT_SUMMARY}") from None
        if not isinstance(found, dict):
            raise UserError(f"{file} is damaged (no JSON object). {WITHOUT_SUMMARY}")
        return found

    def write(self, name: str, value: Any) -> None:
        """As JSON, whole or not at all."""
        with atomic_path(self.path / name) as beside:
            beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

    @contextmanager
    def advising(self) -> Iterator[None]:
        """Add to an interruption how to resume."""
        advice = f"The same command again resumes in {quote(str(self.path))}."
        try:
            yield
        except Interrupted as stopped:
            said = str(stopped).partition(" Resume it with:")[0]
            raise Interrupted(f"{said} {advice}", stopped.exit_code) from None
        except KeyboardInterrupt:
            raise Interrupted(f"stopped. {advice}", 130) from None
