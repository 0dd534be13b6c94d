"""Writes the made parts of docs/papers/*.md from the recipes: `python docs/make_papers.py`.

A page is prose by hand around one part between two marks: every number that the paper prints with
the recipe that runs it, where the released code differs, and which values are not from the paper.
tests/docs/test_papers.py fails while a page differs from what this makes.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from fastkd.recipes.catalogue import recipes_by_module
from fastkd.recipes.entry import Entry
from fastkd.recipes.listing import difference, text_of
from fastkd.recipes.published import METRICS, Published, papers

PAGES = Path(__file__).parent / "papers"
BEGIN = "<!-- made by docs/make_papers.py, from the recipes -->"
END = "<!-- until here -->"
# Module of the recipes -> its page.
PAPERS = ("moonshine", "demystification", "kdda", "meal_v2", "alignkd")
NAMES = {name: f"{name}.md" for name in PAPERS}
MOST_VALUES = 4
LONGEST = 60


def pages() -> dict[str, str]:
    """The text of every page with its part made anew, by file name."""
    made = {"index.md": "\n".join(_overview())}
    made |= {file: "\n".join(_paper(name)) for name, file in NAMES.items()}
    return {file: _within((PAGES / file).read_text(), part) for file, part in made.items()}


def _within(page: str, part: str) -> str:
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"a page lacks the lines {BEGIN} and {END}: {page[:60]!r}")
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{after}"


def _overview() -> Iterator[str]:
    yield "| paper | recipes | numbers |"
    yield "| --- | --- | --- |"
    for name, file in NAMES.items():
        entries = recipes_by_module()[name].values()
        rows = [entry for entry in entries if entry.row is None]
        numbers = sum(len(entry.published) for entry in rows)
        yield f"| [{papers()[name]['title']}]({file}) | {len(rows)} | {numbers} |"


def _paper(name: str) -> Iterator[str]:
    entries = [*recipes_by_module()[name].values()]
    found = {cell: entry for entry in entries if entry.row is None for cell in entry.published}
    for table, facts in papers()[name]["tables"].items():
        cells = {cell: entry for cell, entry in found.items() if cell.table == table}
        if cells:
            place = next(iter(cells)).place
            yield from _table(f"{place[:1].upper()}{place[1:]}: {facts['title']}", cells)
    yield from _others(entries)
    yield from _silent(entries)


def _table(title: str, cells: dict[Published, Entry]) -> Iterator[str]:
    names = [*dict.fromkeys(entry.name for entry in cells.values())]
    groups = [*dict.fromkeys("/".join(name.split("/")[:2]) for name in names)]
    measured = ", ".join(dict.fromkeys(METRICS[cell.metric] for cell in cells))
    yield f"### {title}"
    yield ""
    yield f"{len(cells)} numbers ({measured}), {len(names)} recipes."
    yield ""
    yield "```bash"
    for group in groups:
        yield f"fastkd recipes {group}"
    yield f"fastkd train {names[-1]} data.root=DIR"
    yield "```"
    yield ""
    yield '<details markdown="1">'
    yield "<summary>Every number and its recipe</summary>"
    yield ""
    yield "| row | column | paper | recipe |"
    yield "| --- | --- | --- | --- |"
    for cell, entry in cells.items():
        spread = "" if cell.std is None else f" ± {cell.std:.2f}"
        number = f"{cell.value:.2f}{spread}"
        yield f"| {cell.row} | {cell.column} | {number} | `{entry.name}` |"
    yield ""
    yield "</details>"
    yield ""


def _others(entries: list[Entry]) -> Iterator[str]:
    """The rows in their other mode, one line for all that differ in the same keys."""
    rows = {entry.name: entry for entry in entries}
    groups: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.row is not None:
            groups[tuple(difference(rows[entry.row].keys, entry.keys))].append(entry)
    if not groups:
        return
    yield "### Rows in their other mode"
    yield ""
    yield "| one of them | how many | what is different from the row of the same name |"
    yield "| --- | --- | --- |"
    for keys, same in groups.items():
        yield f"| `{same[0].name}` | {len(same)} | {', '.join(map(_short, keys))} |"
    yield ""


def _short(words: str) -> str:
    """In code; a list of many numbers is cut."""
    return f"`{words}`" if len(words) <= LONGEST else f"`{words[:LONGEST].rpartition(',')[0]},..`"


def _silent(entries: list[Entry]) -> Iterator[str]:
    """Keys whose values are not from the paper, by key and source."""
    values: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for entry in entries:
        for key, source in entry.silent.items():
            values[key, source][text_of(entry.keys[key])] = None
    yield "### Values that are not from the paper"
    yield ""
    yield "`fastkd recipes show NAME` says so for each recipe."
    yield ""
    yield "| key | value | where it is from |"
    yield "| --- | --- | --- |"
    for (key, source), found in sorted(values.items()):
        shown = [_short(value) for value in [*found][:MOST_VALUES]]
        more = ["..."] if len(found) > MOST_VALUES else []
        yield f"| `{key}` | {', '.join(shown + more)} | {source} |"


if __name__ == "__main__":
    for file, text in pages().items():
        (PAGES / file).write_text(text)
