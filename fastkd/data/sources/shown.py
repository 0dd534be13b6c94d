"""Names of files and folders as messages show them: on one line, whatever bytes they hold."""

from os import PathLike, fsdecode

__all__ = ["few", "shown"]

_LONGEST = 300


def shown(name: str | bytes | PathLike[str]) -> str:
    """The name as it is, or quoted with escapes where a reader could not see what it is.

    A terminal would obey control characters, a line break ends the message early, and a byte that
    is no UTF-8 cannot be printed. Long names are cut in the middle.
    """
    text = fsdecode(name)
    if not text.isprintable() or text != text.strip():
        text = repr(text)
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]} .. {text[-half:]}"
    return text


def few(names: list[str]) -> str:
    """The first five names and how many more there are."""
    if not names:
        return "none"
    listed = ", ".join(shown(name) for name in names[:5])
    return listed + (f" and {len(names) - 5} more" if len(names) > 5 else "")
