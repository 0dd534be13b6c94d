"""How text that others wrote is shown: keys, values, file names, metadata of a checkpoint.

The lowest module: `fastkd.errors` and `fastkd.output.console` pass everything through `printable`,
so that no file name can move the cursor, colour the screen or forge a line.
"""

__all__ = ["printable", "shown"]

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


def shown(text: str, limit: int = 100) -> str:
    """Somebody's word inside a sentence: as it is, or as repr where a character cannot be seen."""
    cut = text if len(text) <= limit else f"{text[: limit - 2]}.."
    return cut if cut.isprintable() else printable(repr(cut), limit)
