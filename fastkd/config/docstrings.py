"""Docstrings that are read at run time, also under `python -OO`, which drops them."""

import ast
import inspect
import textwrap

__all__ = ["docstring_of"]


def docstring_of(kind: type) -> str:
    """The docstring of a class, its own or inherited, without indentation."""
    for base in kind.__mro__[:-1]:
        if found := base.__doc__ or _in_source(base):
            return inspect.cleandoc(found)
    return ""


def _in_source(kind: type) -> str:
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError, SyntaxError):
        return ""
    return ast.get_docstring(node) or "" if isinstance(node, ast.ClassDef) else ""
