"""Who is imitated in a training: networks, and where their answers are kept."""

from dataclasses import dataclass

from fastkd.models.counting.count import cost
from fastkd.teachers.cache.opening import AnswerCache
from fastkd.teachers.loaded import LoadedNet

__all__ = ["Teaching"]


@dataclass(frozen=True)
class Teaching:
    """The frozen networks of a run; none for a student on its own."""

    nets: tuple[LoadedNet, ...] = ()
    """Not built where the cache replaces them."""
    cache: AnswerCache | None = None
    """Of their answers, if they are kept."""

    @property
    def compiled(self) -> bool:
        """Whether one is compiled although the run may not be."""
        if self.cache and self.cache.compiled:
            return True
        return any(one.compiled for one in self.nets)

    def macs(self, image_shape: tuple[int, int, int]) -> tuple[float | None, ...]:
        """Multiply-accumulates of each for an image of the data; None where nobody can tell.

        Those whose answers are read from a cache count too: what is decided by them must not
        depend on whether they are.
        """
        if self.cache and self.cache.replaces_teacher:
            return self.cache.known.macs
        found = (cost(one.model, one.image_shape(image_shape)) for one in self.nets)
        return tuple(None if one is None else one.macs for one in found)
