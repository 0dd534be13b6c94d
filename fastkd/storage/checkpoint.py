"""What survives a crash: `last.pt` holds everything a run needs to resume, bit for bit.

Saving is atomic (temporary file, flush, rename), so a kill during a save leaves the previous
checkpoint intact. Random state is not saved because none exists: order, augmentation and dropout
follow from (seed, epoch, step).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from fastkd.config.values import is_mapping
from fastkd.errors import RunFailed, UserError
from fastkd.storage.atomic import FULL, atomic_path

__all__ = ["FORMAT", "Checkpoint", "save_checkpoint"]

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values atomically; RunFailed where the disk refuses."""
    try:
        with atomic_path(path) as beside, beside.open("wb") as file:
            try:
                torch.save(state | {"format": FORMAT}, file)
            except RuntimeError as error:
                # While an OSError propagates, torch's zip writer fails with an error of its own.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
    except RunFailed as error:
        if not path.exists():
            raise
        full = isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
        raise RunFailed(
            f"{error}. The previous checkpoint is intact: {'free some space and ' if full else ''}"
            f"continue with --resume {path.parent} (a call of distill: with resume=True)"
        ) from error.__cause__


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, read once and passed to everything that needs a part of it."""

    path: Path
    state: dict[str, Any]
    """As passed to `save_checkpoint`, with tensors on the CPU."""

    @classmethod
    def open(cls, path: Path, digest: str | None = None) -> Self:
        """Read a checkpoint of this format; UserError for any other file or recipe."""
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"there is no checkpoint {path}: nothing to resume") from None
        except Exception as error:  # damaged pickles fail in as many ways as there are opcodes
            raise UserError(
                f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged, "
                f"or not fastkd's"
            ) from error
        state = dict(content) if is_mapping(content) else {}
        found = state.get("format")
        if found != FORMAT:
            shown = repr(found)[:40]
            raise UserError(f"{path} has checkpoint format {shown}, this fastkd reads {FORMAT}")
        _check_envelope(path, state)
        opened = cls(path, state)
        if digest is not None:
            opened.check_digest(digest)
        return opened

    def check_digest(self, digest: str) -> None:
        """UserError if another recipe wrote the checkpoint."""
        written: str = self.state["digest"]
        if written != digest:
            raise UserError(
                f"{self.path} belongs to another recipe (digest {written[:8]}, this one is "
                f"{digest[:8]}): resume it with its own keys, fastkd train --resume "
                f"{self.path.parent}"
            )


def _check_envelope(path: Path, state: dict[str, Any]) -> None:
    """UserError unless every part has a name, and what all runs share is there."""
    decisions = state.get("decisions")
    whole = (
        is_mapping(decisions)
        and all(isinstance(word, str) for pair in decisions.items() for word in pair)
        and "compile" in decisions
        and isinstance(state.get("digest"), str)
    )
    if not whole:
        raise UserError(
            f"{path} cannot be read as a checkpoint: its digest or its decisions are missing, so "
            f"it is damaged, or not fastkd's"
        )
