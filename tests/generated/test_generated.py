"""Thousands of random folders, checkpoints, overrides and loaders, each with its right outcome.

    pytest tests/generated                       # a few of each
    pytest -m matrix tests/generated             # all
    FASTKD_SEED=7 pytest -m matrix tests/generated    # others

A failure names the seed, the kind and the number of the case; these make it again, whatever
else is run.
"""

import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import generated_checkpoints
import generated_folders
import generated_loaders
import generated_overrides
from generated_case import check

SEED = os.environ.get("FASTKD_SEED", "2026")
# Maker of a case, and the number of cases.
KINDS = {
    "overrides": (generated_overrides.make, 2400),
    "folders": (generated_folders.make, 1600),
    "checkpoints": (generated_checkpoints.make, 1600),
    "loaders": (generated_loaders.make, 1000),
}
AT_ONCE = 100
FEW = 20


def _run(kind, numbers, tmp_path):
    make, _ = KINDS[kind]
    print(f"FASTKD_SEED={SEED}")
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            check(make(random.Random(f"{SEED} {kind} {number}"), folder))
        except Exception as error:
            error.add_note(f"FASTKD_SEED={SEED}, {kind}, case {number}")
            raise


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_generated_cases_end_as_they_should(kind, tmp_path):
    _run(kind, range(FEW), tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("kind", "first"),
    [(kind, first) for kind, (_, num) in KINDS.items() for first in range(0, num, AT_ONCE)],
)
def test_all_generated_cases_end_as_they_should(kind, first, tmp_path):
    num = KINDS[kind][1]
    _run(kind, range(first, min(first + AT_ONCE, num)), tmp_path)
