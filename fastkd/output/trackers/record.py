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
from fastkd.printable import brief, in_words
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
    except UnicodeDecodeError as error:
        raise _damaged(folder, error) from None
    try:
        return {name: _kept(one) for name, one in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(folder, error) from None


def write_record(folder: Path, kept: Mapping[str, Kept]) -> None:
    """Write it whole or not at all; RunFailed where the disk refuses."""
    with atomic_path(folder / TRACKERS_FILE) as beside:
        values = {name: asdict(one) for name, one in kept.items()}
        beside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _kept(value: Mapping[str, Any]) -> Kept:
    kept = Kept(value["id"], value["at"], value["rows"], value["open"])
    # A number of rows that is not one would let rows be lost or sent twice without a word.
    if not isinstance(kept.id, str) or not isinstance(kept.at, str):
        raise TypeError(f"id {brief(kept.id)} at {brief(kept.at)}, expected two texts")
    if type(kept.rows) is not int or kept.rows < 0 or type(kept.open) is not bool:
        raise TypeError(
            f"rows {brief(kept.rows)}, open {brief(kept.open)}, expected a whole number from 0 "
            f"and true or false"
        )
    return kept


def _damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{folder / TRACKERS_FILE} is damaged ({in_words(error)}): remove it, and new remote runs "
        f"begin"
    )
