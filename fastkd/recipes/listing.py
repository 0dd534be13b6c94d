"""What `fastkd recipes` prints: an overview, a list with the papers' numbers, one recipe in full.

The overview needs neither torch nor the schema. A list asks the registries what exists.
"""

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from fastkd.errors import UserError
from fastkd.recipes.catalogue import all_recipes, recipes_by_module
from fastkd.recipes.entry import Entry
from fastkd.recipes.published import papers

__all__ = [
    "as_data",
    "details",
    "difference",
    "listing",
    "matching",
    "overview",
    "text_of",
    "title_of_module",
]

# The setting of a module that is not named after its paper.
_PAPERS = {"cifar": "crd"}
# Of modules whose numbers are in no table of published.json.
_TITLES = {
    "imagenet": "Today's training on ImageNet",
    "camvid": "Segmentation of street scenes",
}
_BY = {None: "", "paper": ", by the text of the paper", "released": ", by the released code"}
_WHAT_NEXT = """\
fastkd recipes PATTERN            list them with the papers' numbers: kdda, 'kdda/cifar100/*/kd*'
fastkd recipes show NAME          keys, the paper's number, and what the paper leaves open
fastkd train NAME data.root=DIR   run one"""


def title_of_module(module: str) -> str:
    """The paper of a module of recipes, or what else they have in common."""
    paper = papers().get(_PAPERS.get(module, module))
    return paper["title"] if paper else _TITLES.get(module, module)


def overview() -> Iterator[str]:
    """Lines: recipes without a paper in full, the others counted by paper and data set."""
    for module, entries in recipes_by_module().items():
        paper = papers().get(_PAPERS.get(module, module))
        if paper is None:
            if module in _TITLES:
                yield f"\n{_TITLES[module]}"
            indent = "  " if module in _TITLES else ""
            width = max(map(len, entries))
            for name, one in entries.items():
                yield f"{indent}{name:<{width}}  {one.description}"
            continue
        yield f"\n{paper['title']}"
        rows = [entry for entry in entries.values() if entry.row is None]
        for group, number in Counter(_group(entry) for entry in rows).items():
            yield f"  {group:<30}{number:>5} recipes"
    yield f"\n{_WHAT_NEXT}"


def matching(pattern: str) -> list[Entry]:
    """Entries whose names match a shell pattern; UserError if there are none.

    A pattern without a wildcard is a name, else a prefix (`kdda`), else a part of the path
    (`tlcutmix`). The other mode of a row is listed only if the pattern ends in `:paper` or
    `:released`.
    """
    rows = {
        name: entry
        for name, entry in all_recipes().items()
        if entry.row is None or pattern.endswith(f":{entry.mode}")
    }
    word = pattern.strip("/")
    ways: tuple[Callable[[str], bool], ...] = (
        lambda name: fnmatch.fnmatchcase(name, pattern),
        lambda name: name.startswith(f"{word}/"),
        lambda name: f"/{word}/" in f"/{name}/",
    )
    for matches in ways:
        if found := [entry for name, entry in rows.items() if matches(name)]:
            return found
    raise UserError(
        f"no recipe matches {pattern!r}; expected a part of a name, such as kdda or "
        "resnet56--resnet20, or a shell pattern, such as '*resnet20/kd*'; "
        "`fastkd recipes` shows what there is"
    )


def listing(entries: Sequence[Entry]) -> Iterator[str]:
    """Lines: name, the paper's number, what the recipe needs but does not exist."""
    from fastkd.recipes.missing import missing

    width = max(len(entry.name) for entry in entries)
    waiting = 0
    for entry in entries:
        number = str(entry.published[0]) if entry.published else ""
        lacks = missing(entry)
        waiting += bool(lacks)
        needs = f"  not runnable, needs {', '.join(lacks)}" if lacks else ""
        yield f"{entry.name:<{width}}  {number:<30}{needs}".rstrip()
    runnable = len(entries) - waiting
    yield f"\n{len(entries)} recipes, {runnable} runnable. One in full: fastkd recipes show NAME"


def details(entry: Entry) -> Iterator[str]:
    """Lines: what will run, what the paper printed, and what is not from the paper."""
    from fastkd.losses.base.catalogue import entry_of
    from fastkd.recipes.missing import missing

    yield entry.name
    yield f"{entry.description}{_BY[entry.mode]}"
    if lacks := missing(entry):
        yield f"\nnot runnable, needs {', '.join(lacks)}"
    else:
        yield f"\nfastkd train {entry.name}{_files(entry)}"
    if entry.published:
        yield f"\n{papers()[entry.published[0].paper]['title']}"
    else:
        yield "\nno number from a printed table"
    for cell in entry.published:
        epoch = f", {cell.epoch} epoch" if cell.epoch else ""
        yield f"  {cell}  ({cell.place}, {cell.row}, {cell.column}{epoch})"
    yield from _modes(entry)
    if entry.note:
        yield f"\n{entry.note}"
    yield "\nkeys, all others at their defaults (fastkd train NAME --print-config)"
    defaults = _defaults(entry)
    width = max(map(len, (*entry.keys, *defaults)))
    remarks = {key: f"not from the paper: {source}" for key, source in entry.silent.items()}
    shown = {key: text_of(value) for key, value in entry.keys.items()} | defaults
    for key, value in shown.items():
        line = f"  {key:<{width}}  {value}"
        remark = "default" if key in defaults else remarks.get(key)
        yield f"{line:<{width + 26}}  {remark}" if remark else line
    yield "\nlosses, each in full: fastkd losses NAME"
    for loss in _losses(entry):
        yield f"  {loss}: {entry_of(loss).source}"


def as_data(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The same as plain data, for JSON."""
    from fastkd.recipes.missing import missing

    return [
        {
            "name": entry.name,
            "description": entry.description,
            "mode": entry.mode,
            "published": [asdict(cell) for cell in entry.published],
            "needs": missing(entry),
            "keys": dict(entry.keys),
            "loss_defaults": _defaults(entry),
            "not_from_the_paper": entry.silent,
            "note": entry.note,
        }
        for entry in entries
    ]


def _losses(entry: Entry) -> list[str]:
    """Losses of the recipe that this version of fastkd has, in recipe order."""
    from fastkd.losses.base.registry import term_names

    found = dict.fromkeys(key.split(".")[1] for key in entry.keys if key.startswith("losses."))
    return [loss for loss in found if loss in term_names()]


def _defaults(entry: Entry) -> dict[str, str]:
    """Loss keys at their defaults, so that no number is hidden."""
    from fastkd.losses.base.catalogue import entry_of

    keys = {
        f"losses.{loss}.{key.name}": key.default
        for loss in _losses(entry)
        for key in entry_of(loss).keys
    }
    return {key: default for key, default in keys.items() if key not in entry.keys}


def _group(entry: Entry) -> str:
    """`moonshine/cifar10/`, `cifar100/`."""
    parts = entry.name.split("/")
    return "/".join(parts[: max(1, len(parts) - 2)]) + "/"


def _modes(entry: Entry) -> Iterator[str]:
    """The same row in its other mode, paper or released code."""
    row = entry.row or entry.name
    for other in all_recipes().values():
        if row in (other.name, other.row) and other.name != entry.name:
            changed = ", ".join(difference(entry.keys, other.keys))
            yield f"\n{other.name}{_BY[other.mode]}: {changed}"


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What the keys of `other` have that `one` has not: `no KEY`, or `KEY=VALUE`."""
    gone = [f"no {key}" for key in one if key not in other]
    return gone + [
        f"{key}={text_of(value)}"
        for key, value in other.items()
        if key not in one or one[key] != value
    ]


def _files(entry: Entry) -> str:
    """What only the user knows: folder of the data, file of the initial weights."""
    root = "" if entry.keys["data.name"] in ("digits", "synthetic") else " data.root=DIR"
    return root + " student.weights=FILE" * ("student.weights" in entry.keys)


def text_of(value: Any) -> str:
    """As on a command line."""
    if isinstance(value, list) and not any(isinstance(item, dict) for item in value):
        return ",".join(map(text_of, value))
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n...\n").strip()
