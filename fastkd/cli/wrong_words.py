"""What is wrong with a word of the command line, and what to write instead."""

import argparse
import difflib
from collections.abc import Sequence

from fastkd.printable import shown

__all__ = ["near", "no_option", "see"]


def near(word: str, words: Sequence[str]) -> str:
    """The end of a sentence on a wrong word: the most similar of the right ones, or all."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else f": choose {', '.join(words)}"


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
    if "words" in options and options.command not in ("recipes", "predict"):
        following = [*arguments[arguments.index(word) + 1 :], ""][0]
        if not value and "=" not in following and not following.startswith("-"):
            value = following
        if keys := _keys(flag, value):
            return f"{says}; what decides a run is a key, without dashes: {keys}"
    if word.endswith("\r"):
        says += ": a script with the line ends of Windows puts \\r behind its last word"
        return f"{says}. See `{command} --help`"
    known = [known for known in parser._option_string_actions if len(known) > 2]
    message = f"{says}{near(flag, known)}"
    return f"{message}{see(message, command)}"


def _keys(flag: str, value: str) -> str:
    """`--batch-size 64` -> `batch_size=64`; empty if no key ends in this word."""
    from fastkd.config.mistakes import nearest_keys
    from fastkd.recipe.overrides import type_of
    from fastkd.recipe.printing import valid_keys

    name = flag.strip("-").replace("-", "_")
    known = valid_keys(("kd", "ce"))
    keys = [name] if name in known else nearest_keys(name, known)[:2]
    # What a value looks like, if none was given.
    examples = {int: "3", float: "0.1", bool: "true"}
    return " or ".join(f"{key}={value or examples.get(type_of(key), '..')}" for key in keys)
