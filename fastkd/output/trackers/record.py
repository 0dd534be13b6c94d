"""trackers.json of a run folder: which remote runs it has, and how many rows each has taken.

Flow: `tracking` reads it when a run starts, so that a resumed run continues the same remote runs,
and writes it after every row that a tracker has taken.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastkd.output.trackers.sink import Kept
from fastkd.storage.atomic import atomic_path

__all__ = ["TRACKERS_FILE", "read_record", "write_record"]

TRACKERS_FILE = "trackers.json"


def read_record(folder: Path) -> dict[str, Kept]:
    """What the folder remembers, by tracker; empty for one that is new.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        text = (folder / TRACKERS_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        return {name: _kept(one) for name, one in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{folder / TRACKERS_FILE} is damaged ({error}): remove it, and new remote runs begin"
        ) from None


def write_record(folder: Path, kept: Mapping[str, Kept]) -> None:
    """Write it whole or not at all; RunFailed where the disk refuses."""
    with atomic_path(folder / TRACKERS_FILE) as beside:
        values = {name: asdict(one) for name, one in kept.items()}
        beside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _kept(value: Mapping[str, Any]) -> Kept:
    return Kept(str(value["id"]), str(value["at"]), int(value["rows"]), bool(value["open"]))
