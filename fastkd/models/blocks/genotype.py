"""A genotype as a recipe writes it: which layers get which cheap block, how deep a stage is.

    blocks  {layer1: G(4), layer3.*: BG(2,M/8)}   paths of modules or stages, with * as in a shell
    depth   {stage2: 3} or [5, 3, 5]              residual blocks that a stage keeps, its first ones

Read by the recipe keys `student.blocks` and `student.depth` and by `create_model`;
`models.rewrite.genotype` and `models.rewrite.shorten` apply them to a network.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastkd.config.values import is_list, is_mapping
from fastkd.errors import UserError
from fastkd.models.blocks.grammar import parse_block
from fastkd.printable import shown

__all__ = [
    "BLOCKS_EXAMPLE",
    "DEPTH_EXAMPLE",
    "Depth",
    "canonical_blocks",
    "canonical_depth",
    "genotype_in_words",
]

Depth = Mapping[str, int] | Sequence[int]
"""Blocks to keep by stage or path, or for every stage in order."""

BLOCKS_EXAMPLE = "{layer1: G:4, layer3.*: BG:2:M:8}"
DEPTH_EXAMPLE = "{stage2: 3} or 5,3,5"

_PATH = re.compile(r"[A-Za-z0-9_.*?\[\]!-]{1,200}")
MOST = 1000
"""Entries of a map."""
SPELLED = 2
"""Entries that a label spells out; of a longer map it gives a number to tell it from others."""


def canonical_blocks(given: object) -> dict[str, str]:
    """Pattern -> the canonical name of its block. UserError for anything but such a map."""
    if not is_mapping(given) or not 0 < len(given) <= MOST:
        raise UserError(
            f"blocks={shown(str(given), 80)}: expected a block for each path or stage, such as "
            f"{BLOCKS_EXAMPLE}; block=G:4 gives every layer the same"
        )
    found: dict[str, str] = {}
    for pattern, block in given.items():
        _check_path("blocks", pattern)
        try:
            found[pattern] = str(parse_block(block))
        except UserError as error:
            raise UserError(f"blocks: {pattern}: {error}") from None
    return found


def canonical_depth(given: object) -> dict[str, int] | list[int]:
    """The same as a plain map or list. UserError for anything else, and for counts below 1."""
    counts: list[Any] = []
    if is_mapping(given):
        for path in given:
            _check_path("depth", path)
        counts = list(given.values())
    elif is_list(given):
        counts = list(given)
    if not 0 < len(counts) <= MOST or not all(
        type(one) is int and 0 < one < 10_000 for one in counts
    ):
        raise UserError(
            f"depth={shown(str(given), 80)}: expected how many residual blocks a stage keeps, at "
            f"least 1: {DEPTH_EXAMPLE} (all stages in order)"
        )
    return dict(given) if is_mapping(given) else counts


def _check_path(key: str, path: object) -> None:
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise UserError(
            f"{key}: {shown(str(path), 80)} is not the path of a module or stage, such as layer1, "
            f"stage2 or layer3.*"
        )


def genotype_in_words(blocks: Mapping[str, str] | None, depth: Depth | None) -> str:
    """For labels: `{layer1: G(4)} depth 5-3-5`; a long map is cut and numbered by its contents."""
    words: list[str] = []
    if blocks:
        words.append(_map(blocks))
    if is_mapping(depth):
        words.append(f"depth {_map(depth)}")
    elif depth:
        words.append(f"depth {'-'.join(map(str, depth))}")
    return " ".join(words)


def _map(given: Mapping[str, object]) -> str:
    entries = [f"{path}: {value}" for path, value in given.items()]
    if len(entries) > SPELLED + 1:
        number = hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()[:4]
        entries = [*entries[:SPELLED], f".. {len(entries) - SPELLED} more, {number}"]
    return f"{{{', '.join(entries)}}}"
