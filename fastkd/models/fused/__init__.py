"""Runs grouped 3x3 -> 1x1 chains of any network as one op, without changing its modules.

Flow: install.py (`use_kernels`) asks find.py for the chains in a symbolic trace of each block, and
puts a `FusedMethod` (method.py) in front of the block's `forward`. It runs the trace (trace.py) in
which each chain (chain.py) is one call, and the block's own code wherever somebody needs to see
plain modules. choice.py asks the planner which chains are worth it.
"""

from fastkd.models.fused.install import kernels_report, use_kernels

__all__ = ["kernels_report", "use_kernels"]
