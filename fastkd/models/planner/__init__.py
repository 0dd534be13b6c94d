"""Picks how a grouped 3x3 + pointwise block computes: fused, or by plain modules.

Flow: `fastkd.models` asks `CHOOSER` for each block and input shape, `fastkd doctor --blocks`
prints what it answers. spec.py has the question, decide.py the rule, measure.py the clock, store.py
the times kept on disk, costs.py the committed times, chooser.py puts them together.

Every process decides for itself. With several ranks, two of them may choose differently where the
times are close; their results then differ by rounding, and each is right. Blocks whose statistics
come from all ranks (SyncBN) are not asked about, as their collectives depend on the kind.
"""

from fastkd.models.planner.chooser import CHOOSER, Chooser
from fastkd.models.planner.spec import DEFAULT_KERNELS, BlockSpec, Case, Choice, KernelChoice, Kind

__all__ = [
    "CHOOSER",
    "DEFAULT_KERNELS",
    "BlockSpec",
    "Case",
    "Choice",
    "Chooser",
    "KernelChoice",
    "Kind",
]
