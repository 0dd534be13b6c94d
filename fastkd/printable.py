"""How text that others wrote is shown: keys, values, file names, metadata, messages of errors.

The lowest module: `fastkd.errors` and `fastkd.output.console` pass everything through `printable`,
so that no file name can move the cursor, colour the screen or forge a line.
"""

from collections.abc import Iterable
from os import PathLike, fsdecode

__all__ = ["brief", "few", "first_line", "in_words", "printable", "shown"]

MESSAGE = 2000
"""Longest sentence, in characters."""


def printable(text: str, limit: int = MESSAGE) -> str:
    """The text on one line: characters that a terminal obeys or nobody sees become escapes.

    A text above the limit loses its middle; what to change stands at the end of a sentence.
    """
    if not text.isprintable():
        text = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text[: 2 * limit])
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    return f"{text[:head]} .. {text[head + 4 - limit :]}"


def shown(word: str | bytes | PathLike[str], limit: int = 300) -> str:
    """Somebody's word or file name inside a sentence: as it is, or as repr where a reader could
    not see what it is. A long one loses its middle.
    """
    text = fsdecode(word)
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} .. {text[-half:]}"
    return text if text.isprintable() and text == text.strip() else printable(repr(text), limit)


def brief(value: object) -> str:
    """Somebody's value inside a sentence: its repr, cut."""
    try:
        return shown(repr(value), 60)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a list in itself
        return "(too large to show)"


def few(words: Iterable[str | bytes | PathLike[str]]) -> str:
    """The first five words and how many more there are; "none" without any."""
    every = list(words)
    more = f" and {len(every) - 5} more" if len(every) > 5 else ""
    return ", ".join(shown(word) for word in every[:5]) + more if every else "none"


def first_line(said: BaseException | str, limit: int = 300) -> str:
    """The message of somebody else's error, for the inside of a sentence."""
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    # TorchScript puts the message last, behind its own trace.
    line = lines[-1] if lines and lines[0].startswith("The following operation failed") else ""
    line = line or next(iter(lines), "")
    return line[:limit].rstrip(".") or type(said).__name__


def in_words(error: BaseException) -> str:
    """Class and first line of an error."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"
