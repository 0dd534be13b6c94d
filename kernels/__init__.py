"""Fused operations of fastkd, each with an eager reference.

The device of the tensors picks the implementation: C++ on the CPU, Triton on a GPU, plain torch
where neither is there. `status()` says which it is.
"""

if __name__ != "fastkd.kernels":
    raise ImportError(
        f"this folder is the package `fastkd.kernels`, not {__name__!r}; run from another folder, "
        "or set PYTHONSAFEPATH=1 to reach the PyPI package `kernels`"
    )

from fastkd.kernels._library import Impl, status
from fastkd.kernels.attention_map import AttentionForm, attention_loss, attention_map
from fastkd.kernels.grouped_pointwise import Activation, Norm, grouped_pointwise
from fastkd.kernels.hardness import Criterion, Hardest, hardness, select_hardest
from fastkd.kernels.kd_loss import KDRows, kd_loss, kd_loss_mean
from fastkd.kernels.mix import mix

__all__ = [
    "Activation",
    "AttentionForm",
    "Criterion",
    "Hardest",
    "Impl",
    "KDRows",
    "Norm",
    "attention_loss",
    "attention_map",
    "grouped_pointwise",
    "hardness",
    "kd_loss",
    "kd_loss_mean",
    "mix",
    "select_hardest",
    "status",
]
