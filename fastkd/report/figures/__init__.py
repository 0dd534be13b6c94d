"""The figures of `fastkd report`: every kind by its name, and the modules that hold them.

A module lists its kinds in `KINDS`. It is named once, here.
"""

from types import ModuleType

from fastkd.report.figures import (
    alignment,
    calibration,
    classes,
    cost,
    divergence,
    embeddings,
    epochs,
    samples,
    step_time,
    supervision,
    weights,
)
from fastkd.report.figures.figure import Drawn, FigureKind

__all__ = ["FIGURES", "Drawn", "FigureKind"]

# In the order of the report.
_MODULES: tuple[ModuleType, ...] = (
    epochs,
    cost,
    supervision,
    classes,
    calibration,
    divergence,
    samples,
    weights,
    embeddings,
    alignment,
    step_time,
)

FIGURES: dict[str, FigureKind] = {kind.name: kind for module in _MODULES for kind in module.KINDS}
"""Every kind of figure by its name."""
