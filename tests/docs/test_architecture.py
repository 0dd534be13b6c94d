"""The files and names that docs/architecture.md, docs/howto/ and CONTRIBUTING.md point to exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
HOW_TO = sorted((ROOT / "docs" / "howto").glob("*.md"))
CONTRIBUTING = "\n".join(page.read_text() for page in (ROOT / "CONTRIBUTING.md", *HOW_TO))
# What is planned has no file yet.
PRESENT = ARCHITECTURE.partition("These places are reserved")[0]
# Names that are banned, or that stand for the file of this name in any package.
GENERIC = {"utils.py", "helpers.py", "common.py", "misc.py", "config.py"}
FOLDERS_OF_OTHERS = {"htmlcov/", "cifar10/", "camvid/", "site/"}
PATH = r"`((?:[\w.]+/)*[\w.]+\.(?:pyi?|cpp|txt|md)|(?:\w+/)+)`"
FILES = sorted(set(re.findall(PATH, CONTRIBUTING)) - FOLDERS_OF_OTHERS)
NAMES = re.findall(r"`([\w/]+\.py)`: `([\w.]+)`", PRESENT)


def where(path: str, beside: Path = ROOT) -> Path | None:
    """The file or folder: from the root, from fastkd/, or beside another."""
    places = (ROOT, ROOT / "fastkd", beside)
    return next((place / path for place in places if (place / path).exists()), None)


def test_every_file_of_the_architecture_page_exists() -> None:
    missing = []
    for line in PRESENT.splitlines():
        beside = ROOT
        for path in (one for one in re.findall(PATH, line) if one not in GENERIC):
            found = where(path, beside)
            if found is None:
                missing.append(path)
            elif found.is_file():
                beside = found.parent
    assert missing == []


@pytest.mark.parametrize("path", [path for path in FILES if "/" in path])
def test_every_path_of_the_contributors_pages_exists(path: str) -> None:
    assert where(path)


@pytest.mark.parametrize(("file", "name"), NAMES)
def test_every_name_is_in_its_file(file: str, name: str) -> None:
    found = where(file)
    assert found
    text = found.read_text()
    for part in name.split("."):
        assert re.search(rf"^\s*(?:def|class) {part}\b|^{part}\b.* = ", text, re.MULTILINE), part


def test_files_and_names_were_found() -> None:
    assert len(NAMES) > 25
    assert len(FILES) > 15


def test_every_package_has_its_row() -> None:
    table = PRESENT.partition("## Packages")[2].partition("```mermaid")[0]
    there = {
        path.name
        for path in (ROOT / "fastkd").iterdir()
        if (path / "__init__.py").exists() or path.suffix == ".py"
    }
    assert [one for one in sorted(there - {"__init__.py"}) if f"`{one}`" not in table] == []
