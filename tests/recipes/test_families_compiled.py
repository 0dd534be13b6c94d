"""Every family of recipes compiled: traced in CI, by inductor in the slow set, which takes pieces:

    FASTKD_SHARE=2/12 pytest -m slow tests/recipes/test_families_compiled.py
    pytest -m slow 'tests/recipes/test_families_compiled.py::test_inductor_computes_what_runs[kd]'

run the second of twelve shares of the families, and one. The families are rows of families.yaml,
run by family_runs.py.
"""

import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

import fastkd.teachers.teacher
import fastkd.training.engine

sys.path.insert(0, str(Path(__file__).parent))
from family_runs import COMPILED, FAMILIES, Workplace, at_work, families, taken

COMPILED_STEPS, COMPILED_TOLERANCE = 3, 1e-4
PART, PARTS = map(int, os.environ.get("FASTKD_SHARE", "1/1").split("/"))
assert 1 <= PART <= PARTS, f"FASTKD_SHARE={PART}/{PARTS}: expected 1/{PARTS} to {PARTS}/{PARTS}"
SHARE = list(FAMILIES)[PART - 1 :: PARTS]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with at_work(tmp_path_factory.mktemp("families")) as place:
        yield place


def compare_compiled(workplace: Workplace, name: str) -> None:
    """The first steps of the compiled family against those of the plain one."""
    counters.clear()
    trainer = workplace.gentle(name, "compile=on")
    compiled = list(taken(trainer, islice(trainer.prepare(0), COMPILED_STEPS)))
    # The step at least, and each teacher that is asked.
    assert counters["stats"]["unique_graphs"] >= 1 + (trainer.teacher is not None)
    plain = workplace.gentle(name)
    steps = list(taken(plain, islice(plain.prepare(0), COMPILED_STEPS)))
    for step, expected in zip(compiled, steps, strict=True):
        assert step == pytest.approx(expected, rel=COMPILED_TOLERANCE)


@families(COMPILED)
def test_the_compiler_traces_what_runs(
    workplace: Workplace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced(unit: Any, *, enabled: bool, **_: Any) -> Any:
        if not enabled:
            return unit
        return torch.compile(unit, backend="aot_eager", dynamic=False, fullgraph=True)

    monkeypatch.setattr(fastkd.training.engine, "compile_unit", traced)
    monkeypatch.setattr(fastkd.teachers.teacher, "compile_unit", traced)
    compare_compiled(workplace, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARE)
def test_inductor_computes_what_runs(workplace: Workplace, name: str) -> None:
    # Its own generator would draw other negatives of CRD than the plain step does.
    with inductor_config.patch(fallback_random=True):
        compare_compiled(workplace, name)
