"""`fastkd recipes` and `fastkd losses`: what there is to choose from."""

import argparse
import json

from fastkd.errors import UserError
from fastkd.recipes import listing
from fastkd.recipes.catalogue import find_entry

__all__ = ["losses", "recipes"]


def recipes(options: argparse.Namespace) -> None:
    """Print an overview, the recipes that match a pattern, or one recipe in full."""
    words: list[str] = options.words
    if words[:1] == ["show"]:
        if len(words) != 2:
            raise UserError("expected one name: fastkd recipes show NAME")
        entries = [find_entry(words[1])]
        lines = listing.details(entries[0])
    elif len(words) > 1:
        raise UserError(f"one pattern at a time, in quotes for the shell; got {' '.join(words)}")
    elif words or options.json:
        entries = listing.matching(*words or ["*"])
        lines = listing.listing(entries)
    else:
        entries, lines = [], listing.overview()
    if options.json:
        print(json.dumps(listing.as_data(entries), indent=1))
        return
    for line in lines:
        print(line)


def losses(options: argparse.Namespace) -> None:
    """List the losses, or print formula, source and keys of one."""
    from fastkd.losses.base.catalogue import catalogue, entry_of
    from fastkd.losses.base.registry import ALIASES, plain

    if options.name is None:
        for entry in catalogue():
            print(f"{entry.name:<15}{entry.summary}")
        return
    name = plain(options.name.removeprefix("losses."))
    means = ALIASES.get(name, (name,))
    try:
        entries = [entry_of(one.partition(".")[0]) for one in means]
    except ValueError as error:
        raise UserError(str(error)) from None
    if name in ALIASES:
        print(f"{name} is {' and '.join(f'losses.{one}' for one in means)}\n")
    for entry in entries:
        print(f"fastkd.losses.{entry.term.__name__}\n\n{entry.text}\n")
        for key in entry.keys:
            meaning = " ".join(key.meaning.split())
            print(f"losses.{entry.name}.{key.name}={key.default}  # {meaning}")
