"""The named recipes: one module per paper or data set, entries by name, unbuilt.

A module has `recipes() -> dict[name, Entry]`. Names read paper/dataset/TEACHER--STUDENT/method with
zoo names, followed by `:released` or `:paper` if paper and released code differ.
"""

import difflib
from dataclasses import replace
from functools import cache
from importlib import import_module

from fastkd.errors import UserError
from fastkd.recipes.entry import Entry

__all__ = ["all_recipes", "find_entry", "recipes_by_module"]

_OF_PAPERS = ("cifar", "moonshine", "demystification", "kdda", "meal_v2", "alignkd")
_MODULES = ("quickstart", "folder", "pairs", *_OF_PAPERS, "imagenet", "camvid")

# On digits bf16 costs what distillation gains (benchmarks/results/quickstart_seeds_bf16.md);
# benchmarks/precision_on_cifar10.py is the measurement that could allow it here.
_FP32 = "torch's default then; that bf16 costs no accuracy has not been shown"


@cache
def recipes_by_module() -> dict[str, dict[str, Entry]]:
    """The entries of every module, in the order of the modules."""
    parts = {name: import_module(f"fastkd.recipes.{name}").recipes() for name in _MODULES}
    for module in _OF_PAPERS:
        parts[module] = {name: _in_fp32(entry) for name, entry in parts[module].items()}
    return parts


def _in_fp32(entry: Entry) -> Entry:
    keys, sources = {"precision": "fp32"}, {"precision": _FP32}
    return replace(entry, keys={**keys, **entry.keys}, sources={**sources, **entry.sources})


def all_recipes() -> dict[str, Entry]:
    """Every named recipe, unbuilt."""
    return {name: entry for part in recipes_by_module().values() for name, entry in part.items()}


def find_entry(name: str) -> Entry:
    """A named recipe, unbuilt; UserError names the nearest.

    `name:paper` also finds `name` if that is the paper's mode already; the same for `:released`.
    """
    recipes = all_recipes()
    if name in recipes:
        return recipes[name]
    base, _, mode = name.rpartition(":")
    if base in recipes and mode == recipes[base].mode:
        return recipes[base]
    near = difflib.get_close_matches(name, recipes, n=3, cutoff=0.5)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    raise UserError(f"there is no recipe {name!r}.{hint} `fastkd recipes` lists all of them.")
