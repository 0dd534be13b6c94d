"""Which layer of a network gets which block: the map of `cheapen(model, blocks=..)` resolved.

Every pattern of the map has a set of convolutions, those below the modules that it names. Where
several patterns have one, the pattern whose set lies inside the others' wins; of equal sets the
one with more characters besides wildcards.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fastkd.errors import UserError
from fastkd.models.rewrite.paths import Names

__all__ = ["Choices", "Claim"]


@dataclass(frozen=True)
class Claim:
    """One entry of the map, on one network."""

    pattern: str
    block: str
    convs: frozenset[str] = field(repr=False)
    """Paths of the convolutions that it names or contains."""

    @property
    def length(self) -> int:
        """Characters besides wildcards."""
        return len(re.sub(r"\[[^]]*\]|[*?]", "", self.pattern))

    def beats(self, other: "Claim") -> bool:
        """Whether it is the more specific of the two."""
        if self.convs == other.convs:
            return self.length > other.length
        return self.convs < other.convs


class Choices:
    """`choices.of(path)` is the claim on a convolution, None if no pattern names it."""

    def __init__(
        self, blocks: Mapping[str, str], names: Names, convs: Collection[str], title: str
    ) -> None:
        self.names = names
        claims: list[Claim] = []
        for pattern, block in blocks.items():
            found = frozenset(path for path in convs if names.are(pattern, path))
            if not found:
                if any(names.are(pattern, path) for path in names.modules):
                    raise UserError(f"blocks: {pattern} names no convolution of {title}")
                raise UserError(
                    f"blocks: {pattern} names nothing in {title}: {names.nearest(pattern)}"
                )
            claims.append(Claim(pattern, block, found))
        self.claims = claims
        self._of = {path: self._best(path) for path in convs}

    def _best(self, path: str) -> Claim | None:
        rivals = [claim for claim in self.claims if path in claim.convs]
        best = [one for one in rivals if all(one.beats(other) for other in rivals if other != one)]
        if rivals and not best:
            first, second = [
                one for one in rivals if not any(other.beats(one) for other in rivals)
            ][:2]
            raise UserError(
                f"blocks: {first.pattern} and {second.pattern} both name {path}, and neither says "
                f"it more closely: give {path} an entry of its own, or name less"
            )
        return best[0] if best else None

    def of(self, path: str) -> Claim | None:
        """The claim on a convolution."""
        return self._of[path]

    def is_literal(self, claim: Claim, path: str) -> bool:
        """Whether the pattern is the very name of this convolution."""
        return claim.pattern in self.names.spellings(path)

    def of_whole(self, owner: str, inside: Collection[str]) -> Claim | None:
        """The claim on a residual block, if it names the block and holds for all of its layers."""
        found = {self._of[path] for path in inside}
        claim = next(iter(found), None)
        if len(found) != 1 or claim is None:
            return None
        return claim if self.names.are(claim.pattern, owner) else None
