"""The files and names that docs/architecture.md and CONTRIBUTING.md point to exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
PAGES = {
    "docs/architecture.md": ARCHITECTURE,
    "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(),
}
# What is planned has no file yet.
PRESENT = ARCHITECTURE.partition("These places are reserved")[0]
PATH = r"`((?:[\w.]+/)*[\w.]+\.(?:pyi?|cpp|txt|md)|(?:\w+/)+)`"


def where(path: str, beside: Path = ROOT) -> Path | None:
    """The file or folder, from the root or from fastkd/."""
    found = [one for one in (ROOT / path, ROOT / "fastkd" / path, beside / path) if one.exists()]
    return found[0] if found else None


def test_every_file_of_the_architecture_page_exists() -> None:
    missing = []
    for line in PRESENT.splitlines():
        beside = ROOT
        for path in re.findall(PATH, line):
            found = where(path, beside)
            if found is None:
                missing.append(path)
            elif found.is_file():
                beside = found.parent
    assert missing == []


NAMES = re.findall(r"`([\w/]+\.py)`: `([\w.]+)`", PRESENT)


@pytest.mark.parametrize(("file", "name"), NAMES)
def test_every_name_is_in_its_file(file: str, name: str) -> None:
    found = where(file)
    assert found is not None
    text = found.read_text()
    for part in name.split("."):
        assert re.search(rf"^\s*(?:def|class) {part}\b|^{part}\b.* = ", text, re.MULTILINE), part


def test_names_were_found() -> None:
    assert len(NAMES) > 25


def test_every_package_has_its_row() -> None:
    table = PRESENT.partition("## Packages")[2].partition("```mermaid")[0]
    there = {
        path.name
        for path in (ROOT / "fastkd").iterdir()
        if (path.is_dir() and (path / "__init__.py").exists()) or path.suffix == ".py"
    }
    there -= {"__init__.py"}
    assert sorted(one for one in there if f"`{one}`" not in table) == []
