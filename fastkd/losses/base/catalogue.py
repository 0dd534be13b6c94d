"""The facts about every loss of the registry: formula, source, needs, weight, tests, keys.

All of them are read from the code: the term's docstring, which has a fixed order (`FIELDS` come
last), and its recipe keys. `fastkd losses NAME` and docs/make_losses.py print it.
"""

import inspect
import re
import textwrap
from dataclasses import dataclass

from fastkd.config.docstrings import docstring_of
from fastkd.losses.base.keys import keys_of
from fastkd.losses.base.registry import ALIASES, term_class, term_names
from fastkd.losses.base.term import LossTerm

__all__ = ["FIELDS", "PATH", "CatalogueEntry", "Key", "catalogue", "entry_of"]

FIELDS = ("Source", "Needs", "Weight", "Tests")
"""The last paragraph of a term's docstring: each begins a line, in this order."""

PATH = r"[\w/]+\.(?:py|json)"
"""A file in the text after `Tests:`."""


@dataclass(frozen=True)
class Key:
    """A recipe key of a loss."""

    name: str
    default: str
    """As a recipe spells it; empty if the recipe must set it."""
    meaning: str


@dataclass(frozen=True)
class CatalogueEntry:
    """One loss."""

    name: str
    """In a recipe: losses.NAME."""
    term: type[LossTerm]
    summary: str
    """First sentence of the docstring."""
    formula: str
    notes: tuple[str, ...]
    """Paragraphs after the formula, unchanged, some of them indented."""
    source: str
    needs: str
    weight: str
    proof: str
    """Text after `Tests:`: tests and oracles, or a note that no number was released; full paths."""
    tests: tuple[str, ...]
    """Its paths from the root of the repository: tests, then oracles."""
    keys: tuple[Key, ...]
    aliases: tuple[str, ...]
    """Other names for it, or for it with a key: `fastkd losses ALIAS` leads here."""

    @property
    def text(self) -> str:
        """The docstring without `Args:`, the paths of its tests and oracles in full."""
        doc = docstring_of(self.term)
        before = _without_arguments(doc[: doc.rindex("\nTests:") + 1])
        return before + textwrap.fill(f"Tests: {self.proof}", 96, break_long_words=False)


def catalogue() -> list[CatalogueEntry]:
    """Every loss, by name."""
    return [entry_of(name) for name in term_names()]


def entry_of(name: str) -> CatalogueEntry:
    """One loss; UserError names the nearest name, ValueError says what its docstring lacks."""
    term = term_class(name)
    text, *fields = _split(docstring_of(term), term.__name__)
    summary, formula, *notes = _without_arguments(text).split("\n\n")
    source, needs, weight, tests = (" ".join(field.split()) for field in fields)
    paths = _paths(tests)
    in_full = iter(paths)
    if not formula.startswith("    "):
        raise ValueError(f"the docstring of {term.__name__} has no indented formula after line 1")
    return CatalogueEntry(
        name=name,
        term=term,
        summary=" ".join(summary.split()),
        formula=inspect.cleandoc(formula),
        notes=tuple(notes),
        source=source,
        needs=needs,
        weight=weight,
        proof=re.sub(PATH, lambda _: next(in_full), tests),
        tests=paths,
        keys=tuple(
            Key(
                key, "" if field.is_required() else _spelled(field.default), field.description or ""
            )
            for key, field in keys_of(term).model_fields.items()
        ),
        aliases=tuple(
            alias
            for alias, means in ALIASES.items()
            if name in (one.partition(".")[0] for one in means)
        ),
    )


def _split(doc: str, name: str) -> list[str]:
    """The text before the fields, then the fields."""
    parts = re.split("|".join(rf"(?:^|\n+){field}:\s" for field in FIELDS), doc)
    if len(parts) != len(FIELDS) + 1:
        raise ValueError(
            f"the docstring of {name} must end with {', '.join(FIELDS)}, each with a colon"
        )
    return parts


def _without_arguments(doc: str) -> str:
    """The arguments are `keys`."""
    return re.sub(r"\n\nArgs:\n(?: .*(?:\n|$))*", "\n", doc)


def _paths(tests: str) -> tuple[str, ...]:
    """Of `tests/losses/test_a.py, test_b.py; oracle c.json (..)`; a bare name is in the folder
    before it."""
    found, folder = [], ""
    for path in re.findall(PATH, tests):
        before, slash, name = path.rpartition("/")
        folder = before + slash if slash else folder
        found.append(folder + name)
    return tuple(found)


def _spelled(value: object) -> str:
    """A default as in a recipe file: {a: b}, [a, b], true, null, 4.0."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
