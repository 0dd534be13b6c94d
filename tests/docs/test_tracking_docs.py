"""docs/tracking.md names what there is: trackers, extras, files, commands, options."""

import re
import tomllib
from pathlib import Path

from fastkd.cli.arguments import parsers
from fastkd.output.trackers.opening import TRACKERS
from fastkd.output.trackers.record import TRACKERS_FILE
from fastkd.output.trackers.sink import PROJECT

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tracking.md").read_text()
ROWS = re.findall(r'^\| `(\w+)` \| `pip install "fastkd\[(\w+)\]"`', PAGE, re.MULTILINE)


def test_the_table_has_every_tracker_and_its_extra() -> None:
    assert [(name, sink.extra) for name, sink in TRACKERS.items()] == ROWS
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for _, extra in ROWS:
        assert extra in extras["optional-dependencies"]


def test_variables_are_those_that_the_sinks_read() -> None:
    code = "".join(path.read_text() for path in (ROOT / "fastkd/output/trackers").glob("*.py"))
    named = set(re.findall(r"\b(?:MLFLOW|TRACKIO|WANDB)_[A-Z_]+", PAGE))
    # The packages themselves read these.
    theirs = {"TRACKIO_DIR", "WANDB_API_KEY", "WANDB_ENTITY"}
    assert named - set(re.findall(r"[A-Z]+_[A-Z_]+", code)) == theirs


def test_names_of_files_options_and_sections() -> None:
    assert f"`{TRACKERS_FILE}`" in PAGE and f"project `{PROJECT}`" in PAGE
    assert "--verbose" in parsers()[1]["train"]._option_string_actions
    titles = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in _titles()}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= titles
    for other in re.findall(r"\]\((\w+\.md)\)", PAGE):
        assert (ROOT / "docs" / other).exists()


def _titles() -> list[str]:
    return re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
