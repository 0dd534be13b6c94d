"""Names of the cheap substitutes for a 3x3 convolution: from text to a `Block` and back.

Read by `create_model(block=..)`, `cheapen` and the recipe key `student.block`; `models.blocks`
builds the layers. N is the number of channels that enter the 3x3 convolution, M = out / b the width
of a bottleneck. Moonshine (Crowley, Gray, Storkey 2018, arXiv 1711.02613) table 1, and the columns
gK and GK of Demystification (Jha, Saini, Mittal 2020, arXiv 2006.16589) tables 8 and 9.
"""

import difflib
import re
import warnings
from dataclasses import dataclass
from typing import Literal

from fastkd.errors import UserError
from fastkd.printable import shown

__all__ = ["GRAMMAR", "Block", "parse_block"]

GRAMMAR = (
    "S, S-2x2, G(g), G(N/d), G(N), B(b), BG(b,g), BG(b,M/d) or BG(b,M), "
    "in a shell G:4, G:N:8, G:N, B:2, BG:2:4, BG:2:M:8"
)


MAX_LENGTH = 40
"""Characters of a name, spaces included."""

_NUMBER = r"([1-9][0-9]{0,5})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One substitute; `str()` gives its canonical name, which `parse_block` reads back."""

    kind: Literal["S", "S-2x2", "G", "B", "BG"]
    squeeze: int = 1
    """b: the bottleneck has out_channels / b channels."""
    groups: int | None = None
    """Groups of the 3x3 convolution, the same everywhere."""
    group_width: int | None = None
    """Or d, its channels per group, the same everywhere."""

    @property
    def is_bottleneck(self) -> bool:
        """B and BG, which take the place of both convolutions of a residual block."""
        return self.kind in ("B", "BG")

    def width(self, out_channels: int) -> int:
        """M, the channels of the bottleneck. UserError if b does not divide out_channels."""
        if out_channels % self.squeeze:
            raise UserError(
                f"block {self}: {out_channels} channels cannot be divided by {self.squeeze}; "
                f"choose a b that divides {out_channels}"
            )
        return out_channels // self.squeeze

    def count_groups(self, channels: int) -> int:
        """Groups of a 3x3 convolution with `channels` inputs. UserError if they do not divide."""
        if self.group_width is not None:
            if channels % self.group_width:
                raise UserError(
                    f"block {self}: {channels} channels cannot be split into groups of "
                    f"{self.group_width}; choose a d that divides {channels}"
                )
            return channels // self.group_width
        groups = self.groups or 1
        if channels % groups:
            raise UserError(
                f"block {self}: {channels} channels cannot be split into {groups} groups; "
                f"choose a g that divides {channels}"
            )
        return groups

    def __str__(self) -> str:
        if self.kind in ("S", "S-2x2"):
            return self.kind
        if self.kind == "B":
            return f"B({self.squeeze})"
        letter = "N" if self.kind == "G" else "M"
        if self.group_width is None:
            groups = str(self.groups)
        else:
            groups = letter if self.group_width == 1 else f"{letter}/{self.group_width}"
        return f"G({groups})" if self.kind == "G" else f"BG({self.squeeze},{groups})"


def parse_block(text: str) -> Block:
    """A block by name, in the papers' spelling or with colons; spaces are ignored.

    Demystification's `g4` means G(4), and its `G4` means G(N/4): a warning reports how they were
    read. Raises UserError with the grammar and the nearest valid name.
    """
    if not isinstance(text, str):
        raise UserError(f"block {text!r}: expected text: {GRAMMAR}")
    if len(text) > MAX_LENGTH:
        raise UserError(f"there is no block {shown(text)}; expected {GRAMMAR}")
    compact = "".join(text.split())
    column = re.fullmatch(rf"([gG]){_NUMBER}", compact)
    if column:
        many, number = column[1] == "g", int(column[2])
        block = Block(kind="G", groups=number) if many else Block(kind="G", group_width=number)
        meaning = f"{number} groups in every layer" if many else f"{number} channels in every group"
        warnings.warn(
            f"block {text!r} is read as a column of Demystification's tables: {block}, {meaning}",
            stacklevel=2,
        )
        return block
    block = _parse(_parenthesised(compact))
    if block is None:
        raise UserError(
            f"there is no block {text!r}; expected {GRAMMAR}. Nearest: {_near(compact)}"
        )
    return block


def _parenthesised(compact: str) -> str:
    """`BG:2:M:8` -> `BG(2,M/8)`."""
    name, *arguments = re.sub(r"([NM]):(?=\d)", r"\1/", compact).split(":")
    return f"{name}({','.join(arguments)})" if arguments else name


def _parse(name: str) -> Block | None:
    if name in ("S", "S-2x2"):
        return Block(kind=name)
    number = _NUMBER
    if match := re.fullmatch(rf"B\({number}\)", name):
        return Block(kind="B", squeeze=int(match[1]))
    if match := re.fullmatch(rf"G\(({number}|N(?:/{number})?)\)", name):
        return Block(kind="G", **_groups(match[2], match[3]))
    if match := re.fullmatch(rf"BG\({number},(?:{number}|M(?:/{number})?)\)", name):
        return Block(kind="BG", squeeze=int(match[1]), **_groups(match[2], match[3]))
    return None


def _groups(number: str | None, width: str | None) -> dict[str, int]:
    return {"groups": int(number)} if number else {"group_width": int(width or 1)}


def _near(wrong: str) -> str:
    """The valid name, with the numbers of the wrong one, that looks most like it."""
    # Moonshine's released code has its own names: G8B2 is BG(2,M/8), A8B2 is BG(2,8).
    if code := re.fullmatch(rf"([AG]){_NUMBER}B{_NUMBER}", wrong):
        return f"BG({code[3]},{'M/' if code[1] == 'G' else ''}{code[2]})"
    first, second, *_ = [*re.findall(_NUMBER, wrong), "4", "4"]
    names = ["S", "S-2x2", f"G({first})", "G(N)", f"G(N/{first})", f"B({first})"]
    names += [f"BG({first},M)", f"BG({first},{second})", f"BG({first},M/{second})"]
    return max(names, key=lambda name: difflib.SequenceMatcher(None, wrong.upper(), name).ratio())
