"""`last.pt`: the state of a run as named parts, used by both saving and resuming.

A part has `state_dict` and `load_state_dict`; `Trainer.saved_parts` declares them all. The file
also has `digest` and `decisions`, which a resumed run must share.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from fastkd.compute.collectives import all_reduce_sum
from fastkd.compute.compiling import CompileSwitch
from fastkd.compute.ranks import World, on_main
from fastkd.errors import UserError
from fastkd.losses.base.term import LossTerm
from fastkd.models.card import card_of
from fastkd.models.fused import use_kernels
from fastkd.models.planner import CHOOSER
from fastkd.storage.checkpoint import Checkpoint, save_checkpoint
from fastkd.training.saved_state import check_optimizer, check_part, check_rows

__all__ = [
    "Rows",
    "SavedPart",
    "SumsOverRanks",
    "TermStates",
    "keep_plain",
    "open_checkpoint",
    "restore",
    "states_of",
    "write",
]


class SavedPart(Protocol):
    """What a checkpoint saves and restores."""

    def state_dict(self) -> Any:
        """Tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Continue from the value of `state_dict`."""
        ...


@dataclass(frozen=True)
class TermStates:
    """Connectors and memory banks of the losses, by name."""

    terms: Sequence[LossTerm]

    def state_dict(self) -> dict[str, Any]:
        """State of each loss."""
        return {term.name: term.state_dict() for term in self.terms}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Each loss finds its own."""
        for term in self.terms:
            term.load_state_dict(states[term.name])


@dataclass(frozen=True)
class SumsOverRanks:
    """Running sums of this rank; the file has the sums over all ranks."""

    sums_M: Tensor
    world: World

    def state_dict(self) -> Tensor:
        """Summed over the ranks, all of which must call this."""
        sums_M = self.sums_M.clone()
        if self.world.size > 1:
            all_reduce_sum(sums_M)
        return sums_M

    def load_state_dict(self, sums_M: Tensor) -> None:
        """Each rank takes an equal share."""
        self.sums_M.copy_(sums_M / self.world.size)


@dataclass(frozen=True)
class Rows:
    """The rows of metrics so far."""

    rows: list[dict[str, Any]]

    def state_dict(self) -> list[dict[str, Any]]:
        """The rows."""
        return self.rows

    def load_state_dict(self, rows: list[dict[str, Any]]) -> None:
        """Replace them in place."""
        self.rows[:] = rows


def states_of(parts: Mapping[str, SavedPart | None]) -> dict[str, Any]:
    """The state of every part; None for a part that this run lacks. All ranks must call this."""
    return {name: None if part is None else part.state_dict() for name, part in parts.items()}


def write(path: Path, digest: str, decisions: dict[str, str], states: dict[str, Any]) -> None:
    """Save atomically; RunFailed where the disk refuses."""
    save_checkpoint(path, {"digest": digest, "decisions": decisions} | states)


def open_checkpoint(folder: Path, digest: str | None, world: World) -> Checkpoint | None:
    """The folder's last.pt, read once, on every rank; None if there is none yet.

    digest: of the run that resumes it; None if the caller compares it.

    From here on the planner answers as it did in that run.

    Raises:
        UserError: it is damaged, or belongs to a run with another digest.
    """
    path = folder / "last.pt"
    # Rank 0 decides: another host may see a new file of a shared folder late.
    if not on_main(world, path.exists):
        return None
    opened = Checkpoint.open(path, digest)
    compile = opened.state["decisions"]["compile"]
    if compile not in get_args(CompileSwitch):
        raise UserError(f"{path} does not fit this run: decisions.compile is {compile[:40]!r}")
    if (choices := opened.state["decisions"].get("kernels")) is not None:
        try:
            CHOOSER.repeat(choices)
        except UserError as error:
            raise UserError(f"{path} does not fit this run: decisions.kernels: {error}") from None
    return opened


def keep_plain(checkpoint: Checkpoint, models: Iterable[nn.Module]) -> None:
    """Let networks of a run that began with plain modules go on so, unless a key says otherwise."""
    if "kernels" in checkpoint.state["decisions"]:
        return
    for model in models:
        if (card := card_of(model)) and card.kernels == "auto":
            use_kernels(model, "plain")


def restore(checkpoint: Checkpoint, digest: str, parts: Mapping[str, SavedPart | None]) -> None:
    """Restore every part; UserError for another recipe's file, or if one does not fit this run.

    All ranks must call this. All parts are compared before the first one is changed.
    """
    checkpoint.check_digest(digest)
    path, saved = checkpoint.path, checkpoint.state
    for name, part in parts.items():
        if part is None:
            continue
        if name not in saved:
            raise UserError(f"{path} does not fit this run: it has no {name}")
        if isinstance(part, Optimizer):
            check_optimizer(path, name, part, saved[name])
        elif isinstance(part, Rows):
            check_rows(path, name, saved[name])
        else:
            check_part(path, name, part.state_dict(), saved[name])
    for name, part in parts.items():
        if part is not None:
            part.load_state_dict(saved[name])
