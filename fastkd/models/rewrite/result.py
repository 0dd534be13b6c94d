"""How every rewrite of a network begins and ends: a copy; new modules in place, name and report.

Called by `cheapen`, `remove_shortcuts` and `fuse`.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fastkd.errors import UserError
from fastkd.models.card import Card, card_of, sign
from fastkd.models.fused.install import use_kernels
from fastkd.models.report import RewriteReport
from fastkd.models.taps import check_network

__all__ = ["copied", "finish"]


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. UserError for anything but a network, or if a part cannot be copied."""
    check_network("model", model)
    try:
        return copy.deepcopy(model)
    except Exception as error:
        # Attributes of a foreign network can raise anything when they are copied.
        raise UserError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); take "
            "wrappers and tensors with a history off it first"
        ) from error


def finish(
    model: nn.Module,
    new_of: Mapping[nn.Module, nn.Module],
    report: RewriteReport,
    options: Mapping[str, Any] | None,
) -> nn.Module:
    """Replace each old module by its new one everywhere; returns the model or its replacement.

    options: those with which `create_model` builds the result; None if it cannot. The network
        then loses its name, so that no weight file claims to be able to rebuild it.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in new_of:
                parent.add_module(name, new_of[child])
    rewritten = new_of.get(model, model)
    card = replace(card_of(model) or Card(), report=report)
    if options is None:
        card = replace(card, name=None, options={})
    elif card.name is not None:
        card = replace(card, options={**card.options, **options})
    sign(rewritten, card)
    return rewritten if card.kernels is None else use_kernels(rewritten, card.kernels)
