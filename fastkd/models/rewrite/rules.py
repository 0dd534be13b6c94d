"""Which convolutions `cheapen` takes: all ordinary ones, those named, or each as a map says.

A rule answers two questions: which block a whole residual block of the zoo gets, and which one a
single convolution gets, or why it stays as it is.
"""

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import nn
from torch.nn.modules.conv import _ConvNd

from fastkd.errors import UserError
from fastkd.models.blocks.genotype import genotype_in_words
from fastkd.models.blocks.grammar import Block, parse_block
from fastkd.models.card import card_of, title_of
from fastkd.models.report import grouped
from fastkd.models.rewrite.genotype import Choices
from fastkd.models.rewrite.paths import Names, parents

__all__ = ["KEPT", "Eligible", "Mapped", "Named", "Rule", "convs_of", "size_of"]

SHORTCUT_NAMES = frozenset({"downsample", "shortcut", "skip"})
HEAD_NAMES = frozenset(
    {
        "head",
        "classifier",
        "fc",
        "logits",
        "pre_logits",
        "aux_classifier",
        "auxlogits",
        "aux1",
        "aux2",
    }
)
KEPT = "kept by its residual block"
"""Why a layer stays in a residual block that was built again."""
STEM_NAME = re.compile(r".*stem.*|conv_?1")


class Rule(Protocol):
    """What `cheapen` asks for every residual block of the zoo, then for every convolution."""

    def of_block(self, path: str, block: nn.Module) -> Block | None:
        """The block that all of it gets; None leaves its convolutions to `of_conv`."""
        ...

    def of_conv(self, path: str, conv: _ConvNd, owned: bool) -> Block | str:
        """The block that takes its place, or the reason to leave it.

        owned: it is inside a residual block of the zoo.
        """
        ...

    def must(self, path: str) -> bool:
        """Whether it is an error if the block does not fit there."""
        ...


def convs_of(module: nn.Module) -> dict[str, _ConvNd]:
    """All convolutions by path."""
    return {path: one for path, one in module.named_modules() if isinstance(one, _ConvNd)}


def size_of(conv: _ConvNd) -> str:
    """`3x3`."""
    return "x".join(map(str, conv.kernel_size))


class Named:
    """`where=` given: exactly what its patterns name."""

    def __init__(self, block: Block, where: str | Sequence[str], model: nn.Module) -> None:
        self.block = block
        self.patterns = [where] if isinstance(where, str) else list(where)
        paths = [path for path, _ in model.named_modules() if path]
        for pattern in self.patterns:
            if not fnmatch.filter(paths, pattern):
                near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.4)
                hint = f"; nearest: {', '.join(near)}" if near else ""
                raise UserError(f"where={pattern!r} names no module{hint}")

    def takes(self, path: str) -> bool:
        """Whether a pattern matches the path or one of its parents."""
        return any(fnmatch.filter(parents(path), pattern) for pattern in self.patterns)

    def of_block(self, path: str, block: nn.Module) -> Block | None:
        """If the block is named, or all of it that could be replaced."""
        inside = [f"{path}.{name}" for name, conv in convs_of(block).items() if not _unfit(conv)]
        named = self.takes(path) or (bool(inside) and all(map(self.takes, inside)))
        return self.block if named else None

    def of_conv(self, path: str, conv: _ConvNd, owned: bool) -> Block | str:
        """The block for every convolution that a pattern names, but 1x1."""
        return _unfit(conv) or self.block if self.takes(path) else "not named"

    def must(self, path: str) -> bool:
        """Always: it was named."""
        return True


class Eligible:
    """No `where=`: whole residual blocks of the zoo, else every ordinary 3x3 convolution."""

    def __init__(self, block: Block, model: nn.Module, has_blocks: bool) -> None:
        self.block = block
        self.has_blocks = has_blocks
        self.roles = _roles(model)

    def of_block(self, path: str, block: nn.Module) -> Block | None:
        """Every one."""
        return self.block

    def of_conv(self, path: str, conv: _ConvNd, owned: bool) -> Block | str:
        """The block for an ordinary 3x3 convolution."""
        return self.reason_to_leave(path, conv, owned) or self.block

    def must(self, path: str) -> bool:
        """Never: what does not divide stays."""
        return False

    def reason_to_leave(self, path: str, conv: _ConvNd, owned: bool) -> str | None:
        """None for a convolution to be replaced."""
        if (unfit := _unfit(conv)) is not None:
            return unfit
        if conv.groups > 1:
            return "depthwise already" if conv.groups == conv.in_channels else "grouped already"
        if path in self.roles:
            return self.roles[path]
        if conv.kernel_size != (3, 3):
            return f"{size_of(conv)}, not 3x3"
        return "outside the residual blocks" if self.has_blocks and not owned else None


class Mapped:
    """A map of blocks: each convolution gets that of the most specific pattern, if it is ordinary.

    A pattern that is the very path of a convolution takes it whatever its kind.
    """

    def __init__(self, blocks: Mapping[str, str], model: nn.Module, has_blocks: bool) -> None:
        self.names = Names(model)
        self.convs = convs_of(model)
        card = card_of(model)
        depth = genotype_in_words(None, card.options.get("depth") if card else None)
        self.title = f"{title_of(model)} of {depth}" if depth else title_of(model)
        self.choices = Choices(blocks, self.names, self.convs, self.title)
        self.ordinary = Eligible(Block(kind="S"), model, has_blocks)

    def of_block(self, path: str, block: nn.Module) -> Block | None:
        """If one pattern names the block and no other a part of it."""
        inside = [f"{path}.{name}" for name, conv in convs_of(block).items() if not _unfit(conv)]
        claim = self.choices.of_whole(path, inside)
        return parse_block(claim.block) if claim else None

    def of_conv(self, path: str, conv: _ConvNd, owned: bool) -> Block | str:
        """The block of the most specific pattern."""
        claim = self.choices.of(path)
        if claim is None:
            return "not named"
        literal = self.choices.is_literal(claim, path)
        reason = _unfit(conv) if literal else self.ordinary.reason_to_leave(path, conv, owned)
        return reason or parse_block(claim.block)

    def must(self, path: str) -> bool:
        """If it was named by its path."""
        claim = self.choices.of(path)
        return claim is not None and self.choices.is_literal(claim, path)

    def check(self, changed: Mapping[str, str], left: Mapping[str, str]) -> None:
        """UserError for a pattern under which nothing has changed, unless another had all of it."""
        for claim in self.choices.claims:
            won = [path for path in claim.convs if self.choices.of(path) is claim]
            idle = not changed.keys() & set(won) and KEPT not in map(left.get, won)
            if won and claim.block != "S" and idle:
                why = "; ".join(grouped({path: left[path] for path in sorted(won)}))
                raise UserError(
                    f"blocks: nothing that {claim.pattern} names in {self.title} can become "
                    f"{claim.block}: {why}. The path of a convolution names it whatever its kind"
                )


def _unfit(conv: _ConvNd) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"a {type(conv).__name__}, not a plain Conv2d"
    return "1x1" if max(conv.kernel_size) == 1 else None


def _roles(model: nn.Module) -> dict[str, str]:
    """Which convolutions are stem, shortcut or head, by their place and by the usual names."""
    roles: dict[str, str] = {}
    convs = convs_of(model)
    first = next(iter(convs), "")
    stem = first.partition(".")[0]
    for path in convs:
        parts = set(path.lower().split("."))
        if path == first or (path.startswith(f"{stem}.") and STEM_NAME.fullmatch(stem.lower())):
            roles[path] = "stem"
        elif parts & SHORTCUT_NAMES:
            roles[path] = "shortcut"
        elif parts & HEAD_NAMES:
            roles[path] = "head"
    # A last layer without a normalisation after it gives the logits, whatever its name.
    ends = [
        (path, layer)
        for path, layer in model.named_modules()
        if isinstance(layer, (_ConvNd, nn.Linear)) or "norm" in type(layer).__name__.lower()
    ]
    if ends and ends[-1][0] in convs:
        roles.setdefault(ends[-1][0], "head")
    return roles
