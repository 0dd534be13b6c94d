"""One choice for each case and process: remembered, from the disk, measured, or from the table."""

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from fastkd.errors import UserError
from fastkd.models.planner.costs import Cost, choose_from, committed, nearest
from fastkd.models.planner.decide import sure_winner
from fastkd.models.planner.measure import measure
from fastkd.models.planner.spec import KINDS, Case, Choice, Kind, Shape
from fastkd.models.planner.store import Store

__all__ = ["CHOOSER", "Chooser"]

Samples = Mapping[Kind, Sequence[float]]


_MOST_SIZES = 8
"""Of one block that are measured; other sizes are answered by the nearest of them."""

_LASTING = ("measured", "disk", "run")
"""Sources of choices that a resumed run repeats: those of a clock."""


class Chooser:
    """Answers the same for the same case as long as it lives.

    clock  measures a case: seconds of each kind
    costs  used where nothing may be measured
    """

    def __init__(
        self,
        clock: Callable[[Case], Samples] = measure,
        store: Callable[[torch.device], Store] = Store,
        costs: Callable[[], Sequence[Cost]] = committed,
    ) -> None:
        self._clock, self._store, self._costs = clock, store, costs
        self._chosen: dict[tuple[str, str], dict[Shape, Choice]] = {}
        """By type of device and family, in the order of their first answer."""

    def choose(self, case: Case) -> Choice:
        """The first answer is kept, also where another process measures something else later."""
        if case.device.type not in ("cpu", "cuda"):
            return Choice("plain")
        chosen = self._chosen.setdefault((case.device.type, case.family), {})
        if (kept := chosen.get(case.shape)) is not None:
            return kept
        if not wants_measuring():
            return choose_from(self._costs(), case)
        if len(chosen) >= _MOST_SIZES:
            return Choice(chosen[nearest(case.shape, chosen)].kind, source="near")
        store = self._store(case.device)
        choice = store.get(case)
        if choice is None and is_tracing(case.device):
            return choose_from(self._costs(), case)
        # No lock is held while the clock runs: it may call foreign code, such as hooks.
        choice = chosen.setdefault(case.shape, choice or self._measured(case))
        if choice.source == "measured":
            store.put(case, choice)
        return choice

    def export(self) -> str:
        """What a clock has chosen, as text for a checkpoint."""
        return json.dumps(
            {
                f"{device} {json.dumps(json.loads(family) | {'shape': shape}, sort_keys=True)}": (
                    choice.kind
                )
                for (device, family), chosen in self._chosen.items()
                for shape, choice in chosen.items()
                if choice.source in _LASTING
            }
        )

    def repeat(self, text: str) -> None:
        """Answer as the process did whose `export` this is.

        Raises:
            UserError: it is not one.
        """
        try:
            kinds = json.loads(text)
            read = [(*_read(key), kind) for key, kind in kinds.items()]
        except (ValueError, TypeError, AttributeError, KeyError):
            read = None
        if read is None or not all(kind in KINDS for *_, kind in read):
            raise UserError(
                f"kernel choices {text[:40]!r}: expected a JSON object of blocks, whose values are "
                f"{' or '.join(KINDS)}"
            )
        for device, family, shape, kind in read:
            self._chosen.setdefault((device, family), {})[shape] = Choice(kind, source="run")

    def _measured(self, case: Case) -> Choice:
        try:
            seconds = self._clock(case)
        except torch.OutOfMemoryError:
            return choose_from(self._costs(), case)
        ms: dict[Kind, float] = {
            kind: 1e3 * statistics.median(samples) for kind, samples in seconds.items()
        }
        return Choice(sure_winner(seconds), ms, "measured")


def _read(key: str) -> tuple[str, str, Shape]:
    """Type of device, family and shape of an exported choice."""
    device, _, facts = key.partition(" ")
    family = json.loads(facts)
    num, channels, height, width = map(int, family.pop("shape"))
    return device, json.dumps(family, sort_keys=True), (num, channels, height, width)


def wants_measuring() -> bool:
    """Whether FASTKD_PLANNER leaves the choice to the clock, which is the default.

    Raises:
        UserError: it is neither `measure` nor `table`.
    """
    told = os.environ.get("FASTKD_PLANNER") or "measure"
    if told not in ("measure", "table"):
        raise UserError(f"FASTKD_PLANNER={told}: expected measure or table")
    return told == "measure"


def is_tracing(device: torch.device) -> bool:
    """Whether a clock would say nothing here, as torch only traces, counts or records.

    Not where a compiler asks: what is called as a constant of a graph runs on real tensors.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


CHOOSER = Chooser()
"""That of the process, whose answers a checkpoint keeps."""
