"""Losses: drop-in modules for any loop (`KDLoss`, `KLDivLoss`) and the terms of a recipe.

Loaded on first use, so that a recipe can be validated without building an operator.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd.losses.features import AT as AT
    from fastkd.losses.kd import KDLoss as KDLoss
    from fastkd.losses.kd import KLDivLoss as KLDivLoss
    from fastkd.losses.logits import KD as KD
    from fastkd.losses.logits import CrossEntropy as CrossEntropy
    from fastkd.losses.term import BindContext as BindContext
    from fastkd.losses.term import LossTerm as LossTerm
    from fastkd.losses.term import TermInputs as TermInputs
    from fastkd.losses.term import TermOutput as TermOutput

_HOME = {
    "AT": "features",
    "BindContext": "term",
    "CrossEntropy": "logits",
    "KD": "logits",
    "KDLoss": "kd",
    "KLDivLoss": "kd",
    "LossTerm": "term",
    "TermInputs": "term",
    "TermOutput": "term",
}

__all__ = [
    "AT",
    "KD",
    "BindContext",
    "CrossEntropy",
    "KDLoss",
    "KLDivLoss",
    "LossTerm",
    "TermInputs",
    "TermOutput",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastkd.losses' has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(f"fastkd.losses.{_HOME[name]}"), name)
