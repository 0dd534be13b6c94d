"""One screen for several runs that take turns: every line names its run, the live one is of all.

Flow: `runs.sweep.together` makes a `GroupConsole` and gives each run its part.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from fastkd.output.console import Console

__all__ = ["GroupConsole"]


class GroupConsole:
    """The runs of a group, on the console of the process."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._numbers: dict[str, dict[str, Any]] = {}
        """Of `Console.progress`, by label, of the runs that are under way."""
        self._begun = False

    def of(self, label: str, name: str) -> Console:
        """The part of a run. name: of its recipe, and so of its last stage."""
        return _RunConsole(self, label, name)

    def progress(self, label: str, numbers: dict[str, Any]) -> None:
        """A run has come further: the line shows where the slowest one is."""
        if not self._begun:
            self.console.stage("together")
            self._begun = True
        self._numbers[label] = numbers
        every = list(self._numbers.values())
        slowest = min(every, key=lambda one: (one["epoch"], one["step"]))
        self.console.progress(
            **slowest
            | {
                "images_per_s": sum(one["images_per_s"] for one in every),
                "data_wait": max(one["data_wait"] for one in every),
                "loss": [one["loss"] for one in every],
            }
        )

    def leave(self, label: str) -> None:
        """A run has ended, in whatever way."""
        self._numbers.pop(label, None)


class _RunConsole(Console):
    """What one run of a group says."""

    def __init__(self, group: GroupConsole, label: str, name: str) -> None:
        super().__init__(enabled=group.console.enabled)
        self._live = group.console._live
        self._verbose = group.console._verbose
        self._group, self._label, self._name = group, label, name
        self._is_last = False

    @override
    def close(self) -> None:
        """The live line is the group's."""

    @override
    def note(self, text: str) -> None:
        self._group.console.note(f"{self._label}: {text}")

    @override
    def stage(self, name: str) -> None:
        self._is_last = name == self._name
        super().stage("" if self._is_last else name)
        if not self._is_last:
            self._group.console.stage(f"{self._label}: {name}")

    @override
    def progress(self, **numbers: Any) -> None:
        if self._is_last:
            self._group.progress(self._label, numbers)
        else:
            self._group.console.progress(**numbers)

    @override
    def comparison(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Not between the lines of others: the sweep's table has all of them."""
