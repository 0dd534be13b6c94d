"""Readable report of a rewrite: kept on the network's card, printed by the CLI."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["RewriteReport", "grouped"]

SHOWN = 3


@dataclass(frozen=True, slots=True)
class RewriteReport:
    """What became of which module, by its path in the original network; `str()` is readable."""

    title: str
    changed: Mapping[str, str]
    """Path -> what became of the module."""
    left: Mapping[str, str]
    """Path -> why the module stayed as it was."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.title}: {len(self.changed)} changed, {len(self.left)} left"]
        lines += [f"  changed  {line}" for line in grouped(self.changed)]
        lines += [f"  left     {line}" for line in grouped(self.left)]
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def grouped(texts: Mapping[str, str]) -> list[str]:
    """`16 x 1x1 (layer1.0.conv1, layer1.0.conv3, ..)`, one line for each text."""
    paths: dict[str, list[str]] = {}
    for path, text in texts.items():
        paths.setdefault(text, []).append(path)
    return [
        f"{len(found)} x {text} ({', '.join(found[:SHOWN])}{', ..' * (len(found) > SHOWN)})"
        for text, found in paths.items()
    ]
