"""Writes docs/losses.md from the code: `python docs/make_losses.py`, after a change of a loss.

tests/docs/test_loss_docs.py fails while the file differs from what this makes.
"""

import inspect
import re
from pathlib import Path

from fastkd.losses.base.catalogue import PATH, CatalogueEntry, catalogue
from fastkd.losses.base.registry import ALIASES

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "losses.md"
HEAD = """# Losses

<!-- Made by docs/make_losses.py from the docstrings and recipe keys in fastkd/losses. -->

Every loss of a recipe by its name in it: `losses.NAME.weight=..` switches it on, and
`fastkd losses NAME` prints the same on a terminal, also for a name in use elsewhere ("Also
called"). Formulas, sources and tests are those of the docstring. All sums are fp32 or wider; T is
the temperature; no gradient goes to the teacher.
"""


def page() -> str:
    """The whole file."""
    entries = catalogue()
    rows = [
        f"| [{entry.name}](#{entry.name}) | `{entry.term.__name__}` | {entry.summary} |"
        for entry in entries
    ]
    table = ["| name | class | what it is |", "|---|---|---|"]
    return "\n".join([HEAD, *table, *rows, "", *(section(entry) for entry in entries)])


def section(entry: CatalogueEntry) -> str:
    """One loss."""
    path = Path(inspect.getfile(entry.term)).resolve().relative_to(ROOT)
    keys = [
        f"| `{key.name}` | {_default(key.default)} | {' '.join(key.meaning.split())} |"
        for key in entry.keys
    ]
    return "\n".join(
        [
            f"## {entry.name}",
            "",
            f"`fastkd.losses.{entry.term.__name__}`, [{path}](../{path}). {entry.summary}",
            "",
            "```",
            entry.formula,
            "```",
            "",
            *(f"{_note(note)}\n" for note in entry.notes),
            f"- Source: {_linked(entry.source)}",
            f"- Needs: {entry.needs}",
            f"- Weight: {entry.weight}",
            *([f"- Also called: {_names(entry)}"] if entry.aliases else []),
            f"- Tests and oracles: {_proof(entry)}",
            "",
            f"| key: `losses.{entry.name}.` | default | meaning |",
            "|---|---|---|",
            *keys,
            "",
        ]
    )


def _names(entry: CatalogueEntry) -> str:
    """Aliases in code, each with the key that it also asks for."""
    keys = {alias: ALIASES[alias] for alias in entry.aliases}
    return ", ".join(
        f"`{alias}`" if means == (entry.name,) else f"`{alias}` ({_written(means)})"
        for alias, means in keys.items()
    )


def _written(means: tuple[str, ...]) -> str:
    return " and ".join(f"`losses.{one}`" for one in means)


def _note(note: str) -> str:
    return (
        f"```\n{inspect.cleandoc(note)}\n```" if note.startswith("    ") else " ".join(note.split())
    )


def _default(spelled: str) -> str:
    return f"`{spelled}`" if spelled else "the recipe says"


def _proof(entry: CatalogueEntry) -> str:
    """The text with its paths as links."""
    paths = iter(entry.tests)

    def link(_: re.Match[str]) -> str:
        path = next(paths)
        return f"[{path.rpartition('/')[2]}](../{path})"

    return re.sub(PATH, link, entry.proof)


def _linked(source: str) -> str:
    """arXiv numbers and `owner/repository[@branch] path.py` as links."""
    source = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", source)

    def file(match: re.Match[str]) -> str:
        repository, branch, path = match.groups()
        address = f"https://github.com/{repository}/blob/{branch or 'HEAD'}/{path}"
        return f"[{repository} {path}]({address})"

    return re.sub(r"\b([\w-]+/[\w-]+)(?:@(\w+))? ([\w/-]+\.py)", file, source)


if __name__ == "__main__":
    TARGET.write_text(page())
