"""docs/papers/*.md: the made parts are up to date, and every printed number has its recipe."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from fastkd.recipes.catalogue import all_recipes

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PUBLISHED = json.loads((ROOT / "fastkd" / "recipes" / "published.json").read_text())


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_papers", DOCS / "make_papers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_what_the_recipes_say(maker: ModuleType) -> None:
    made = maker.pages()
    assert len(made) == 6
    for file, text in made.items():
        assert (maker.PAGES / file).read_text() == text, "run python docs/make_papers.py"


def test_a_page_without_marks_is_refused(maker: ModuleType) -> None:
    with pytest.raises(SystemExit, match="lacks the lines"):
        maker._within("# A page\n", "made")


@pytest.mark.parametrize("paper", ["moonshine", "demystification", "kdda", "meal_v2", "alignkd"])
def test_every_number_of_the_tables_is_on_its_page(paper: str) -> None:
    """Counted in the JSON itself: one line a cell that is not empty."""
    wanted = [
        cell[0] if isinstance(cell, list) else cell
        for table in PUBLISHED[paper]["tables"].values()
        for row in table["rows"].values()
        for cell in row
        if cell is not None
    ]
    page = (DOCS / "papers" / f"{paper}.md").read_text()
    rows = re.findall(r"^\|.*\| (\d+\.\d\d)(?: ± [\d.]+)? \| `(.+)` \|$", page, re.MULTILINE)
    assert sorted(float(number) for number, _ in rows) == sorted(wanted)
    assert {name for _, name in rows} <= set(all_recipes())
