"""The documented name of `fastkd.compute.ranks` before 0.2; the same functions."""

from fastkd.compute.ranks import World, join_rows, open_world

__all__ = ["World", "join_rows", "open_world"]
