"""The families with the most state on two ranks: finite, rank-equal, resumed to the last bit.

CRD + TLCutMix + pick has two views, a pool that the student scores and banks; JointRD sends the
student's features through the teacher; x is changed, repeated, mixed and resized. Both ranks are
killed in the middle of the second epoch.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastkd.output.run_folder import RunFolder

# Scenario -> steps of the second epoch that were done, parts of the loss.
FAMILIES = {
    "crd, tlcutmix and pick on two ranks": (1, ("kd", "kd_xprime", "ce", "crd")),
    "mixed x on two ranks": (1, ("kd", "ce")),
    "mixed x": (1, ("kd", "ce")),
    "jointrd on two ranks": (2, ("ce", "jointrd", "jointrd_features")),
}


@pytest.fixture(scope="module")
def found(
    killed_runs: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("families") / "runs"
    return folder, killed_runs(folder, *FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_killed_ranks_end_as_if_nothing_had_happened(
    found: tuple[Path, dict[str, Any]], name: str
) -> None:
    folder, scenarios = found
    run, (steps, parts) = scenarios[name], FAMILIES[name]
    ranks = 2 if "ranks" in name else 1
    assert run["codes"] == [[-9] * ranks, [0] * ranks], run["log"]
    assert f"resumed tiny/kd at epoch 2 of 2, step {steps} of 4" in run["log"]
    # All of last.pt and the rows of metrics, beside a run of two ranks that nobody killed.
    assert run["different"] == []
    assert all(state == run["states"][0] for state in run["states"])
    (path,) = (folder / name.replace(" ", "-")).glob("runs/tiny/kd/*")
    rows = RunFolder.open(path).metrics()
    assert len(rows) == 2
    for row in rows:
        assert row["skipped"] == 0
        for part in ("loss", *parts):
            assert math.isfinite(row[f"train_{part}"])
            assert row[f"train_{part}"] > 0
    if "pick" in name:
        assert all(row["pick_ratio"] > 1 for row in rows)
