"""The live line of a notebook: one output that is redrawn, of plain text, without a widget.

Flow: `console` makes one per stage where Jupyter shows what it prints. Saved notebooks keep its
last state; exporters and viewers without JavaScript show it.
"""

import time
from typing import Any

from rich.console import Console as RichConsole

__all__ = ["NotebookLine", "in_notebook"]

_REDRAWN_S = 0.2
"""A front end that is told more often falls behind."""


def in_notebook() -> bool:
    """Whether a notebook shows what this process prints, and takes outputs that change."""
    if not RichConsole().is_jupyter:
        return False
    try:
        import IPython.display  # noqa: F401 - not a dependency of fastkd, but of every kernel
    except ImportError:
        return False
    return True


class NotebookLine:
    """One output of the cell; nothing until something is shown."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._drawn_s = 0.0

    def show(self, text: str, *, at_once: bool = False) -> None:
        """Redraw it. at_once: even if it was redrawn a moment ago."""
        now_s = time.monotonic()
        if self._handle is not None and not at_once and now_s - self._drawn_s < _REDRAWN_S:
            return
        self._drawn_s = now_s
        content = {"text/plain": text}
        if self._handle is None:
            from IPython.display import display

            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)
