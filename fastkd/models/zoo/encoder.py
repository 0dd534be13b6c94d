"""The part of a network of the zoo that can be trained first; the whole network starts from it."""

from typing import NamedTuple

__all__ = ["Encoder"]


class Encoder(NamedTuple):
    """The first layers of a network, with a classifier of their own."""

    name: str
    """A name of the zoo."""
    taps: tuple[str, ...]
    lacks: tuple[str, ...]
    """Paths of the layers of the whole network that it does not have, without the classifier."""
