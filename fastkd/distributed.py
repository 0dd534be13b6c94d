"""The name of `fastkd.compute.ranks` and its neighbours in 0.1, kept for one release."""

from fastkd.compute.collectives import join_rows
from fastkd.compute.ranks import World, open_world

__all__ = ["World", "join_rows", "open_world"]
