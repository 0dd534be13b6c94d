"""Images that a loader could not read and has shown others for (data.on_bad=skip)."""

from dataclasses import dataclass, field

from fastkd.compute.collectives import on_ranks
from fastkd.compute.ranks import World
from fastkd.output.console import Console

__all__ = ["Unread"]

_NAMED = 3
"""The most files that a rank names on the screen."""


@dataclass
class Unread:
    """Counts them by epoch, and names the first ones."""

    rows: int = 0
    """Of this epoch, on this rank."""
    seen: set[int] = field(default_factory=set[int])
    """Their sample ids."""
    reasons: dict[int, str] = field(default_factory=dict[int, str])
    """Why the first ones cannot be read, until the screen has shown it."""

    def count(self, unread: tuple[tuple[int, str], ...]) -> None:
        """Take note of a batch's; see `Batch.unread`."""
        self.rows += len(unread)
        for sample, reason in unread:
            if sample not in self.seen and len(self.seen) < _NAMED:
                self.reasons[sample] = reason
            self.seen.add(sample)

    def end_epoch(self, world: World, console: Console) -> int:
        """How many images of the epoch could not be read, on all ranks, which must all ask."""
        found = on_ranks((self.rows, self.reasons), world)
        new = {sample: reason for _, reasons in found for sample, reason in reasons.items()}
        for reason in new.values():
            console.note(f"another image is shown for one that cannot be read: {reason}")
        self.seen.update(new)
        self.rows, self.reasons = 0, {}
        return sum(rows for rows, _ in found)
