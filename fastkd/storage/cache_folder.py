"""Where fastkd keeps what it can make again: decoded images, measured times of blocks."""

import os
import tempfile
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """`cache_dir`, else $FASTKD_CACHE, else $XDG_CACHE_HOME/fastkd, else ~/.cache/fastkd.

    A user without a home, as in many containers, has it in the folder for temporary files.
    """
    if cache_dir is not None:
        return Path(cache_dir)
    if chosen := os.environ.get("FASTKD_CACHE"):
        return Path(chosen)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "fastkd"
    try:
        return Path.home() / ".cache" / "fastkd"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"fastkd-{os.getuid()}"
