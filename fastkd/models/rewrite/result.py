"""How every rewrite of a network begins and ends: a copy; new modules in place, name and report.

Called by `cheapen`, `remove_shortcuts` and `fuse`.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastkd.errors import UserError
from fastkd.models.taps import check_network

__all__ = ["RewriteReport", "copied", "finish", "grouped"]

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


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. UserError for what is no network, or holds something that cannot be copied."""
    check_network("model", model)
    try:
        return copy.deepcopy(model)
    except Exception as error:
        # Whatever the attributes of a foreign network raise when they are copied.
        raise UserError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); take "
            "wrappers and tensors with a history off it first"
        ) from error


def grouped(texts: Mapping[str, str]) -> list[str]:
    """`16 x 1x1 (layer1.0.conv1, layer1.0.conv3, ..)`, one line for each text."""
    paths: dict[str, list[str]] = {}
    for path, text in texts.items():
        paths.setdefault(text, []).append(path)
    return [
        f"{len(found)} x {text} ({', '.join(found[:SHOWN])}{', ..' * (len(found) > SHOWN)})"
        for text, found in paths.items()
    ]


def finish(
    model: nn.Module,
    new_of: Mapping[nn.Module, nn.Module],
    report: RewriteReport,
    options: Mapping[str, Any] | None,
) -> nn.Module:
    """Put each new module wherever its old one stands; returns the model, or what replaces it.

    options: those with which `create_model` builds the result; None where it cannot, and then the
        network loses the name under which a weight file would promise to rebuild it.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in new_of:
                parent.add_module(name, new_of[child])
    rewritten: Any = new_of.get(model, model)
    rewritten.rewrite_report = report
    if hasattr(rewritten, "fastkd_name"):
        if options is None:
            del rewritten.fastkd_name, rewritten.fastkd_options
        else:
            rewritten.fastkd_options = {**rewritten.fastkd_options, **options}
    return rewritten
