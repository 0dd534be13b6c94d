"""What is wrong with a word of the command line, and what to write instead."""

import argparse
import difflib
from collections.abc import Collection, Sequence

from fastkd.printable import shown

__all__ = ["near", "no_option", "see"]


def near(word: str, words: Sequence[str]) -> str:
    """The end of a sentence on a wrong word: the most similar of the right ones, or all."""
    # Two dashes alone make no two options similar.
    plain = {one.lstrip("-"): one for one in words}
    found = difflib.get_close_matches(word.lstrip("-"), plain, n=1, cutoff=0.5)
    return f", did you mean {plain[found[0]]}?" if found else f": choose {', '.join(words)}"


def see(message: str, command: str) -> str:
    """What follows a sentence: where to read more."""
    return f"{'' if message.endswith('?') else '.'} See `{command} --help`"


def no_option(
    word: str,
    arguments: Sequence[str],
    options: argparse.Namespace,
    parser: argparse.ArgumentParser,
) -> str:
    """What is wrong with an option that does not exist, and what to write instead."""
    flag, _, value = word.partition("=")
    says = f"there is no option {shown(flag)}"
    command = f"fastkd {options.command}"
    if known := _known_keys(options.command, parser, flag):
        following = [*arguments[arguments.index(word) + 1 :], ""][0]
        if not value and "=" not in following and not following.startswith("-"):
            value = following
        if keys := _keys(flag, value, known):
            return f"{says}; what decides a run is a key, without dashes: {keys}"
    if word.endswith("\r"):
        says += ": a script with the line ends of Windows puts \\r behind its last word"
        return f"{says}. See `{command} --help`"
    known = [known for known in parser._option_string_actions if len(known) > 2]
    message = f"{says}{near(flag, known)}"
    return f"{message}{see(message, command)}"


def _known_keys(command: str, parser: argparse.ArgumentParser, flag: str) -> list[str]:
    """The keys that a command takes; of a loss other than the usual ones if the flag names it."""
    from fastkd.losses.base.registry import term_names
    from fastkd.recipe.printing import valid_keys

    words = [one for one in parser._actions if one.dest == "words"]
    if not any("key=value" in str(one.metavar) for one in words):
        return []
    section, _, loss = _key_of(flag).rpartition(".")[0].partition(".")
    more = [loss] if section == "losses" and loss in term_names() else []
    keys = valid_keys(dict.fromkeys(["kd", "ce", *more]))
    takes = _SOME_KEYS.get(command, lambda: keys)()
    return [key for key in keys if key in takes]


def _of_data() -> Collection[str]:
    from fastkd.cli.data import KEYS

    return KEYS


def _of_latency() -> Collection[str]:
    from fastkd.cli.latency import KEYS

    return KEYS


_SOME_KEYS = {"data": _of_data, "latency": _of_latency}
"""Commands that take some of the keys only."""


def _key_of(flag: str) -> str:
    return flag.strip("-").replace("-", "_")


def _keys(flag: str, value: str, known: Sequence[str]) -> str:
    """`--batch-size 64` -> `batch_size=64`; empty if no known key ends in this word."""
    from fastkd.config.mistakes import nearest_keys
    from fastkd.recipe.overrides import type_of

    name = _key_of(flag)
    keys = [name] if name in known else nearest_keys(name, known)[:2]
    # What a value looks like, if none was given.
    examples = {int: "3", float: "0.1", bool: "true"}
    return " or ".join(f"{key}={value or examples.get(type_of(key), '..')}" for key in keys)
