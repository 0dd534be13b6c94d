"""What becomes of output that nobody reads."""

import os
from contextlib import suppress
from typing import IO

__all__ = ["discard"]


def discard(stream: IO[str]) -> None:
    """Let everything further that is written to a stream vanish, as after its reader has gone."""
    with suppress(OSError, ValueError):
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
