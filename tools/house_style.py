"""The house's own bans: phrases that are not English, tricks against the formatter, machine paths.

Flow: the pre-commit hook `house-style` calls this with the changed files, `nox -s lint` with all of
them. Every rule has an example that it must find, so a pattern that finds nothing is noticed. What
ruff or codespell can find has no place here.

    python tools/house_style.py             every file that git knows
    python tools/house_style.py --count     hits per rule, most frequent first
    python tools/house_style.py FILE ..
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PROSE = {".py", ".md", ".toml", ".yml", ".yaml", ".cff", ".txt", ".h", ".cpp", ".sh"}
CODE = {".py"}
# Results are logs of what was run; this file quotes what it bans.
EXEMPT = ("benchmarks/results/", "tools/house_style.py")
NAMELESS = {"utils", "helpers", "common", "misc"}


class Rule(NamedTuple):
    """What is searched for, what to write instead, and a line in which it must be found."""

    pattern: str
    instead: str
    example: str
    suffixes: set[str] = PROSE


RULES = [
    # Phrases, translated word by word.
    Rule(r"\b(?:leav(?:e|es|ing)|left)\b[^.\n]{0,30}\baway\b", "leave it out", "leave it away"),
    Rule(r"\bstands? (?:there|twice)\b", "appears, is there", "the key stands twice"),
    Rule(r"\bstands? in the (?:saved|recipe|metadata|file|table)\b", "is in", "stands in the file"),
    Rule(r"\b(?:that|those) of the ones?\b", "name it again", "that of the one below"),
    Rule(r"\bthe ones? which\b", "the one that", "the one which was read"),
    Rule(r"\bwith another than\b", "other than", "the first with another than this"),
    Rule(r"\b(?:goes?|gone|going) on (?:with|where)\b", "continue, resume", "it goes on with it"),
    Rule(r"\b(?:broken?|breaks?) off\b", "interrupted, stopped", "where it was broken off"),
    Rule(r"(?<!there )\b(?:is|are) no loss", "is not a loss", "pick is no loss but a choice"),
    Rule(r"\bmore ado\b", "automatically", "saved without more ado"),
    Rule(r"\bso many \w+ (?:at a time|of)\b", "N at a time", "so many runs of a sweep"),
    Rule(r"\baffair\b", "is up to", "that is the user's affair"),
    Rule(r"\bwhat is to be\b", "what must be", "what is to be known"),
    Rule(r"\bcan do with\b", "accepts", "whether it can do with unknown classes"),
    Rule(r"\bcannot be had\b|\bto be had\b", "is not available", "the data cannot be had"),
    Rule(r"\bmend(?:s|ed|ing)?\b", "fix", "a mended bug"),
    Rule(r"\bbut for\b", "except for", "empty but for one line"),
    Rule(r"\bjoin by\b", "are added with", "more teachers join by a key"),
    Rule(r"\bfor ever\b", "forever", "the ranks would wait for ever"),
    Rule(r"\b(?:is|are) at work in\b", "is using, is running in", "another run is at work in it"),
    Rule(r"\bevery so many\b", "every N", "save every so many steps"),
    Rule(r"\bbut that each\b", "except that each", "the same, but that each rank draws its own"),
    Rule(r"\bkeys of a recipe on\b", "recipe keys for", "keys of a recipe on images"),
    Rule(r"\ba lead and no more\b|\ba lead, no evidence\b", "a hint", "a lead, no evidence"),
    # A trick against the formatter; `star_tuples` finds the other.
    Rule(r"# *fmt: *(?:skip|off)", "let ruff lay it out", "x = 1  # fmt: skip", CODE),
    # What nobody can find again, and what exists on one machine only.
    Rule(r"\b(?:TODO|FIXME|XXX)\b(?!\(#\d+\))", "TODO(#123), or an issue", "# TODO: later"),
    Rule(r"(?<![\w.~)}/-])/(?:home|root|tmp|work|Users)/\w", "a relative path", "see /home/me/x"),
]


def main(words: list[str]) -> int:
    """Print every hit, or their number per rule; the exit code is 1 if there is one."""
    blind = [rule for rule in RULES if not re.search(rule.pattern, rule.example)]
    assert not blind, f"these rules do not find their example: {blind}"
    counting = words[:1] == ["--count"]
    files = [Path(word).resolve() for word in words[counting:]] or all_files()
    found = [hit for file in files for hit in hits(file)]
    if counting:
        for ban, number in Counter(ban for _, ban in found).most_common():
            print(f"{number:4} {ban}")
    else:
        print(*(f"{place}: {ban}" for place, ban in found), sep="\n", end="\n" if found else "")
    return int(bool(found))


def all_files() -> list[Path]:
    """The files that git knows; in an unpacked archive, all that lie in folders without a dot."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
        )
        return [ROOT / name for name in listed.stdout.split("\0") if name]
    paths = (path for path in ROOT.rglob("*") if path.is_file())
    return [p for p in paths if not any(x.startswith(".") for x in p.relative_to(ROOT).parts[:-1])]


def hits(file: Path) -> Iterator[tuple[str, str]]:
    """(file:line, what to write instead) of every hit in one file."""
    name = file.relative_to(ROOT).as_posix()
    if name.startswith(EXEMPT) or not file.is_file():
        return
    if file.stem in NAMELESS:
        yield f"{name}:1", f"a file named {file.stem!r} says nothing: name its subject"
    rules = [rule for rule in RULES if file.suffix in rule.suffixes]
    if not rules:
        return
    text = file.read_text(encoding="utf-8")
    if file.suffix in CODE:
        for number in star_tuples(text):
            yield f"{name}:{number}", "'*(a, b)': keyword arguments or items, one a line"
    for number, line in enumerate(text.splitlines(), start=1):
        for rule in rules:
            if match := re.search(rule.pattern, line, re.IGNORECASE):
                yield f"{name}:{number}", f"{match.group()!r}: {rule.instead}"


def star_tuples(text: str) -> list[int]:
    """Lines with `f(*(a, b), c=1)`: positional arguments wrapped so that they share a line."""
    starred = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Starred))
    return [node.lineno for node in starred if isinstance(node.value, ast.Tuple)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
