"""What the runs of a group, trained step by step in one process, make once and share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastkd.output.console import Console
from fastkd.training.interrupt import StopSignal
from fastkd.training.sharing import SharedBatches

__all__ = ["Shared"]

T = TypeVar("T")


@dataclass
class Shared:
    """Data, teachers and batches of a group; a run alone has its own."""

    console: Console
    """Says what concerns all of them."""
    stop: StopSignal | None = None
    """Receives the signals of all runs; None: each run its own."""
    batches: SharedBatches | None = None
    """None: each run its own."""
    _made: dict[str, Any] = field(default_factory=dict[str, Any])

    def once(self, what: str, make: Callable[[], T]) -> T:
        """What the first run of the group has made under this name; `make` makes it."""
        if what not in self._made:
            self._made[what] = make()
        return self._made[what]
