"""docs/figures.md has a row for every figure, with its paper, and names no other."""

import re
from pathlib import Path

from fastkd.report.figures import FIGURES

PAGE = (Path(__file__).parents[2] / "docs" / "figures.md").read_text()
TABLE = PAGE.partition("## Every figure")[2].partition("\n## ")[0]
CELLS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE.splitlines()]
ROWS = {cells[0].strip("`"): cells for cells in CELLS if cells and cells[0].startswith("`")}


def test_every_figure_has_a_row_with_its_paper():
    assert set(ROWS) == set(FIGURES)
    for name, kind in FIGURES.items():
        assert ROWS[name][2] == kind.source


def test_the_options_on_the_page_are_those_of_the_command():
    from fastkd.cli.arguments import parsers

    _, commands = parsers()
    flags = {flag for flag in commands["report"]._option_string_actions if len(flag) > 2}
    named = set(re.findall(r"^\| `(--\w+)", PAGE, re.MULTILINE))
    assert named == flags - {"--help"}
