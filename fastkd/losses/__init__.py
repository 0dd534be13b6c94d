"""Losses: drop-in modules for any loop (`KDLoss`, `KLDivLoss`) and the terms of a recipe.

Loaded on first use, so that a recipe can be validated without building an operator.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd.losses.attention import AT as AT
    from fastkd.losses.base.term import BindContext as BindContext
    from fastkd.losses.base.term import LossTerm as LossTerm
    from fastkd.losses.base.term import TermInputs as TermInputs
    from fastkd.losses.base.term import TermOutput as TermOutput
    from fastkd.losses.crd import CRD as CRD
    from fastkd.losses.discriminator import Discriminator as Discriminator
    from fastkd.losses.dist import DIST as DIST
    from fastkd.losses.dkd import DKD as DKD
    from fastkd.losses.drop_in import KDLoss as KDLoss
    from fastkd.losses.drop_in import KLDivLoss as KLDivLoss
    from fastkd.losses.factor_transfer import FT as FT
    from fastkd.losses.fsp import FSP as FSP
    from fastkd.losses.hints import AB as AB
    from fastkd.losses.hints import VID as VID
    from fastkd.losses.hints import FitNet as FitNet
    from fastkd.losses.jointrd import JointRD as JointRD
    from fastkd.losses.jointrd import StageMSE as StageMSE
    from fastkd.losses.logits import KD as KD
    from fastkd.losses.logits import CrossEntropy as CrossEntropy
    from fastkd.losses.logits import MixedCE as MixedCE
    from fastkd.losses.logits import SoftCE as SoftCE
    from fastkd.losses.multilabel import BinaryCrossEntropy as BinaryCrossEntropy
    from fastkd.losses.nst import NST as NST
    from fastkd.losses.relations import CC as CC
    from fastkd.losses.relations import PKT as PKT
    from fastkd.losses.relations import RKD as RKD
    from fastkd.losses.relations import SP as SP
    from fastkd.losses.reviewkd import ReviewKD as ReviewKD
    from fastkd.losses.simkd import SimKD as SimKD

_HOME = {
    "AB": "hints",
    "AT": "attention",
    "BinaryCrossEntropy": "multilabel",
    "BindContext": "base.term",
    "CC": "relations",
    "CRD": "crd",
    "CrossEntropy": "logits",
    "FSP": "fsp",
    "FT": "factor_transfer",
    "FitNet": "hints",
    "DIST": "dist",
    "DKD": "dkd",
    "Discriminator": "discriminator",
    "JointRD": "jointrd",
    "KD": "logits",
    "KDLoss": "drop_in",
    "KLDivLoss": "drop_in",
    "LossTerm": "base.term",
    "MixedCE": "logits",
    "NST": "nst",
    "PKT": "relations",
    "RKD": "relations",
    "SP": "relations",
    "ReviewKD": "reviewkd",
    "SimKD": "simkd",
    "SoftCE": "logits",
    "StageMSE": "jointrd",
    "TermInputs": "base.term",
    "TermOutput": "base.term",
    "VID": "hints",
}

__all__ = [
    "AB",
    "AT",
    "CC",
    "CRD",
    "DIST",
    "DKD",
    "FSP",
    "FT",
    "KD",
    "NST",
    "PKT",
    "RKD",
    "SP",
    "VID",
    "BinaryCrossEntropy",
    "BindContext",
    "CrossEntropy",
    "Discriminator",
    "FitNet",
    "JointRD",
    "KDLoss",
    "KLDivLoss",
    "LossTerm",
    "MixedCE",
    "ReviewKD",
    "SimKD",
    "SoftCE",
    "StageMSE",
    "TermInputs",
    "TermOutput",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastkd.losses' has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(f"fastkd.losses.{_HOME[name]}"), name)
