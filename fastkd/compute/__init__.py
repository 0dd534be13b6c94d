"""Where and how a run computes: ranks, precision, memory layout, compiler, machine."""
