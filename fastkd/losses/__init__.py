"""Losses: drop-in modules for any loop (`KDLoss`, `KLDivLoss`) and the terms of a recipe.

Loaded on first use, so that a recipe can be validated without building an operator. The names are
those that `__init__.pyi` imports, which type checkers read.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOME = {
    name.name: statement.module
    for statement in _STUB.body
    if isinstance(statement, ast.ImportFrom) and statement.module
    for name in statement.names
}

# Type checkers and ruff want a literal; they read the .pyi, where the names are.
__all__ = sorted(_HOME)  # noqa: PLE0605  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastkd.losses' has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(_HOME[name]), name)
