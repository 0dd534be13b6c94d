"""Options of `create_model` that rewrite a finished network: depth, shortcuts, block, blocks.

Called by `fastkd.models.registry`. Two of them are a genotype, depth and blocks: they keep the
names of what they do not touch, so that weights of the whole network fit the rest of it.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from fastkd.errors import UserError
from fastkd.models.blocks.genotype import canonical_blocks, canonical_depth, genotype_in_words
from fastkd.models.blocks.grammar import parse_block
from fastkd.models.card import card_of, title_of
from fastkd.models.rewrite.cheapen import cheapen
from fastkd.models.rewrite.shortcuts import remove_shortcuts
from fastkd.models.rewrite.shorten import shorten
from fastkd.storage.description import NetworkFacts
from fastkd.storage.finding import lies_in
from fastkd.storage.fitting import load_into
from fastkd.storage.weight_file import WeightFile

__all__ = ["GENOTYPE", "REWRITES", "canonical", "conflicts", "fill", "rewritten"]

REWRITES = ("depth", "shortcuts", "block", "blocks")
"""In the order in which they are applied."""

GENOTYPE = ("depth", "blocks")


def canonical(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with blocks and depths in their canonical form; None is as if it was not there.

    UserError for `block` together with `blocks`.
    """
    forms = {
        "block": lambda given: str(parse_block(given)),
        "blocks": canonical_blocks,
        "depth": canonical_depth,
    }
    options = {k: one for k, one in options.items() if one is not None or k not in GENOTYPE}
    if options.keys() >= {"block", "blocks"}:
        raise UserError(
            "block and blocks exclude each other: block=G:4 is for every layer, blocks for those "
            "that it names; give one of them (a recipe's own is removed by student.block=null)"
        )
    return {key: forms[key](one) if key in forms else one for key, one in options.items()}


def conflicts(option: str, given: Mapping[str, Any]) -> bool:
    """Whether an option of a file's network cannot be added to the given ones."""
    other = {"block": "blocks", "blocks": "block"}.get(option)
    return other is not None and given.get(other) is not None


def rewritten(model: nn.Module, rewrites: Mapping[str, Any]) -> nn.Module:
    """The network with these options applied; `REWRITES` names them."""
    shortcuts = rewrites.get("shortcuts", True)
    if shortcuts not in (True, False, "projection"):
        raise UserError(
            f"shortcuts={shortcuts!r}: of this network they can be kept (True), removed (False) or "
            "removed except for projections ('projection')"
        )
    if "depth" in rewrites:
        model = shorten(model, rewrites["depth"])
    if shortcuts is not True:
        model = remove_shortcuts(model, keep_projection=shortcuts == "projection")
    if "block" in rewrites:
        model = cheapen(model, rewrites["block"])
    return cheapen(model, blocks=rewrites["blocks"]) if "blocks" in rewrites else model


def fill(
    model: nn.Module,
    file: WeightFile,
    facts: NetworkFacts,
    new: tuple[str, ...],
    build: Callable[..., nn.Module],
) -> tuple[str, ...]:
    """Load a file into a network, or into what is left of the network that the file is of.

    facts: of the file. new: layers that are not loaded. build: `create_model`. Returns the options
    by which the network differs from the file's; where there are some, a warning says how much of
    it has its initial weights.
    """
    card = card_of(model)
    assert card is not None and card.name is not None
    source = _whole_of(card.name, card.options, facts)
    refused = None
    if source is None or facts.architecture is None:
        try:
            load_into(model, file, new=new)
            return ()
        except UserError as error:
            # A file that does not describe its network may be of either.
            if source is None:
                raise
            refused = error
    try:
        whole = build(
            card.name, card.num_classes, weights=file, new_head=bool(new), kernels="plain", **source
        )
    except UserError:
        if refused is not None:
            raise refused from None
        raise
    changes = tuple(key for key in GENOTYPE if card.options.get(key) != source.get(key))
    own = genotype_in_words(source.get("blocks"), source.get("depth"))
    held = f"{file} holds the whole {title_of(model)}{own and f' {own}'}"
    _transplant(whole, model, held, changes, new)
    return changes


def _whole_of(name: str, options: Mapping[str, Any], facts: NetworkFacts) -> dict[str, Any] | None:
    """The options of the network that a file may hold if it is not this one, but a larger one.

    That is the same network without the genotype, or without the part of it that the file does
    not have. None if the file is of this network, or of one that shares too little with it.
    """
    mine = {key: options[key] for key in GENOTYPE if key in options}
    if facts.architecture is None:
        return {key: one for key, one in options.items() if key not in mine} if mine else None
    theirs = facts.options
    more = [key for key in mine if key not in theirs]
    same = all(_set(theirs, key) == _set(options, key) for key in REWRITES if key not in more)
    if facts.architecture != name or not more or not same:
        return None
    return {key: one for key, one in options.items() if key not in more}


def _set(options: Mapping[str, Any], key: str) -> Any:
    """An option; None for one that changes nothing."""
    value = options.get(key)
    return None if value == {"block": "S", "shortcuts": True}.get(key) else value


def _transplant(
    whole: nn.Module, model: nn.Module, held: str, changes: Sequence[str], new: Sequence[str]
) -> None:
    """Copy what a network shares with a larger one, by name and shape; a warning says how much.

    held: what the file holds. changes: options that make the difference. new: paths of layers that
    keep their initial weights.
    """
    given, own = whole.state_dict(), model.state_dict()
    fitting = {
        key: given[key]
        for key, value in own.items()
        if key in given and given[key].shape == value.shape and not lies_in(key, new)
    }
    model.load_state_dict(fitting, strict=False)
    fresh = [key for key in own.keys() - fitting.keys() if not lies_in(key, new)]
    layers = sorted({key.rpartition(".")[0] for key in fresh})
    shown = f" ({', '.join(layers[:3])}{', ..' * (len(layers) > 3)})" if layers else ""
    warnings.warn(
        f"{held}: {len(fitting)} of {len(own)} tensors are taken from it, {len(layers)} layers are "
        f"new{shown}; with {' and '.join(changes)} it is another network, which has to be trained",
        stacklevel=2,
    )
