"""docs/environment.md names every variable that the code reads, and no other."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "environment.md").read_text()
FOLDERS = ("fastkd", "kernels", "tests", "benchmarks")
# A variable is read by its name in quotes; CMake's and C++'s own names have none.
READ = re.compile(r"""environ(?:\.get|\.setdefault)?[\[(]\s*["'](FASTKD_\w+)["']""")


def read_by_the_code() -> set[str]:
    files = [ROOT / "setup.py", *(f for name in FOLDERS for f in (ROOT / name).rglob("*.py"))]
    return {name for file in files for name in READ.findall(file.read_text(encoding="utf-8"))}


def test_the_table_is_complete() -> None:
    table = PAGE.partition("## fastkd's own")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == read_by_the_code()


def test_all_that_fastkd_reads_is_found() -> None:
    """Also where a name is not written beside `environ`: then `READ` is too narrow."""
    words = re.compile(r"""["'](FASTKD_[A-Z_]+)["']""")
    files = [f for name in ("fastkd", "kernels") for f in (ROOT / name).rglob("*.py")]
    named = {name for file in files for name in words.findall(file.read_text(encoding="utf-8"))}
    assert named <= read_by_the_code()
    assert "FASTKD_CACHE" in named
