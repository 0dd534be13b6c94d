"""A named recipe before it is built: dotted keys as on a command line, and what its paper says.

Keys are not validated before `fastkd.recipes.loading.build`, so that hundreds of recipes can be
listed at once, and a recipe may need what does not exist yet (`fastkd.recipes.missing` finds
it).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from fastkd.recipes.published import Published

__all__ = ["Entry", "Mode", "by_cell"]

Mode = Literal["paper", "released"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One named recipe."""

    name: str
    """`paper/dataset/TEACHER--STUDENT/method`, or `paper/dataset/NETWORK/scratch`."""
    description: str
    keys: Mapping[str, Any]
    """Dotted recipe keys; all others keep their defaults."""
    published: tuple[Published, ...] = ()
    """The cells that print the outcome of this run."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Key -> origin of its value, for keys that the paper, in the copy we had, does not state."""
    note: str = ""
    """What else differs from the paper or needs to be known."""
    mode: Mode | None = None
    """Whether paper or released code decides if they differ; None: there is no paper."""
    row: str | None = None
    """Name of the entry in the paper's table, if this is its other mode."""
    follow: Callable[[Mapping[str, Any], frozenset[str]], dict[str, Any]] | None = None
    """Dotted keys that follow from others: called with nested values and the keys that the user
    has set, which stay as they are."""

    @property
    def silent(self) -> dict[str, str]:
        """The keys of this recipe that are not from the paper, and their sources."""
        return {key: self.sources[key] for key in self.keys if key in self.sources}

    def in_mode(
        self,
        mode: Mode,
        keys: Mapping[str, Any],
        note: str,
        sources: Mapping[str, str] = MappingProxyType({}),
    ) -> "Entry":
        """The same row in the other mode, named `name:mode`.

        A key with another value loses its source; `sources` gives the new ones, for values that
        are not from the paper.
        """
        same = {key for key, value in keys.items() if self.keys.get(key, ...) == value}
        kept = {key: source for key, source in self.sources.items() if key in same}
        return replace(
            self,
            name=f"{self.name}:{mode}",
            mode=mode,
            keys=keys,
            note=note,
            sources={**kept, **sources},
            row=self.name,
        )


def by_cell(cells: Iterable[Published], describe: Callable[[Published], Entry]) -> dict[str, Entry]:
    """One entry for all cells that print the same run, by name, in the order of the tables."""
    entries: dict[str, Entry] = {}
    for cell in cells:
        described = describe(cell)
        entry = entries.get(described.name, described)
        entries[entry.name] = replace(entry, published=(*entry.published, cell))
    return entries
