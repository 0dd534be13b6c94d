"""The documented name of `fastkd.compute.ranks` before 0.2; the same functions."""

from fastkd.compute.collectives import join_rows
from fastkd.compute.ranks import World, open_world

__all__ = ["World", "join_rows", "open_world"]
