"""Links of the pages, on GitHub and on the site, and what the hook makes of them."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s#]+)")
REPOSITORY = "https://github.com/fastkd/fastkd"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("pymdownx")
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_every_link_has_its_file(page: Path) -> None:
    links = LINK.findall(re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        assert isinstance(values, list) or hasattr(values, "__iter__")
        return [file for value in values for file in files(value)]

    shown = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(shown) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_links_that_leave_the_pages_lead_to_the_repository(hooks: ModuleType) -> None:
    text = "[a](../kernels/README.md#inside), [b](gpu.md), [c](../examples) and `[d](../x)`"
    made, missing = hooks.outside_links(text, "index.md", f"{REPOSITORY}/")
    assert f"[a]({REPOSITORY}/blob/main/kernels/README.md#inside)" in made
    assert f"[b](gpu.md), [c]({REPOSITORY}/tree/main/examples)" in made
    assert missing == ["../x"]


def test_links_between_folders_of_pages_stay(hooks: ModuleType) -> None:
    text = "[a](../gpu.md), [b](../../README.md), [c](../../../x.md)"
    made, missing = hooks.outside_links(text, "papers/kdda.md", REPOSITORY)
    assert "[a](../gpu.md)" in made
    assert f"[b]({REPOSITORY}/blob/main/README.md)" in made
    assert missing == ["../../../x.md"]
