"""The script for other devices: the modules that need no torch, joined into one file.

So the script cannot differ from `fastkd latency`: it is the same source, without the lines that
import one of these modules from another.
"""

import ast
from importlib.resources import files
from pathlib import Path

import fastkd
from fastkd.deploy.latency.alone import Asked, taken
from fastkd.errors import UserError
from fastkd.storage.atomic import atomic_path

__all__ = ["PARTS", "script_text", "write_script"]

PARTS = ("meter", "host", "runtime", "lines", "alone")
"""In the order in which they use each other."""

_HEAD = '''"""Measure how long FILE.onnx takes on this device.

Written by fastkd {version}. Needs Python 3.10, onnxruntime and numpy:

    python THIS_FILE FILE.onnx

The result is FILE.json, which `fastkd latency --read FILE.json` shows.
"""

from __future__ import annotations
'''

_TAIL = """
BATCHES, THREADS, ON = {batch!r}, {threads!r}, {on!r}

if __name__ == "__main__":
    sys.exit(main())
"""


def script_text(asked: Asked) -> str:
    """The script; what is asked are its defaults."""
    sources = [_source(part) for part in PARTS]
    bodies = [ast.parse(source).body for source in sources]
    words = {"batch": [*asked.batch], "threads": [*asked.threads], "on": [*asked.on]}
    return "\n".join(
        [
            _HEAD.format(version=fastkd.__version__),
            *_imports([node for body in bodies for node in body]),
            *map(_alone, sources, bodies),
            _TAIL.format(**words),
        ]
    )


def write_script(target: Path, asked: Asked) -> None:
    """Write it, whole or not at all. UserError if there is such a file."""
    if reason := taken(target):
        raise UserError(reason)
    with atomic_path(target) as beside:
        beside.write_text(script_text(asked), encoding="utf-8")


def _source(part: str) -> str:
    return files("fastkd.deploy.latency").joinpath(f"{part}.py").read_text(encoding="utf-8")


def _imports(nodes: list[ast.stmt]) -> list[str]:
    """All imports of the modules, each once."""
    whole: set[str] = set()
    names: dict[str, set[str]] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            whole |= {ast.unparse(node)}
        elif isinstance(node, ast.ImportFrom) and not _of_package(node):
            names.setdefault(node.module or "", set()).update(map(ast.unparse, node.names))
    parts = [f"from {module} import {', '.join(sorted(of))}" for module, of in names.items()]
    return [*sorted(whole), *sorted(parts)]


def _alone(source: str, body: list[ast.stmt]) -> str:
    """The source of a module without its docstring, its imports and its `__all__`."""
    lines = source.splitlines()
    left_out = [body[0], *(node for node in body if _is_head(node))]
    for node in reversed(left_out):
        del lines[node.lineno - 1 : node.end_lineno]
    kept = "\n".join(lines).strip("\n")
    return f"\n\n# {'-' * 97}\n\n{kept}\n"


def _is_head(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) == "__all__"
    return isinstance(node, ast.Import | ast.ImportFrom)


def _of_package(node: ast.ImportFrom) -> bool:
    return (node.module or "").startswith("fastkd")
