"""Every family of recipes compiled: traced in CI, by inductor in the slow set.

The families are rows of families.yaml, run by family_runs.py.
"""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import fastkd.build
import fastkd.teacher

sys.path.insert(0, str(Path(__file__).parent))
from family_runs import FAMILIES, Workplace, at_work, taken

COMPILED_STEPS, COMPILED_TOLERANCE = 3, 1e-4


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with at_work(tmp_path_factory.mktemp("families")) as place:
        yield place


# Tracing a family takes four times as long as running it. test_loss_contract_papers.py traces all
# losses in one graph; here each kind of block, view, pick and of state in a loss stands once, and
# with inductor all families in the slow set.
COVER = (
    *("at-BG:2:M:8", "no-shortcuts-g", "crd+tlcutmix-pick", "vid+tlcutmix"),
    *("reviewkd", "simkd", "jointrd:released"),
)


def compare_compiled(workplace: Workplace, name: str) -> None:
    """The first steps of the compiled family against those of the plain one."""
    trainer = workplace.gentle(name, "compile=on")
    compiled = list(taken(trainer, islice(trainer.prepare(0), COMPILED_STEPS)))
    assert trainer.plan.decisions["compile"] == "on"
    plain = workplace.gentle(name)
    steps = list(taken(plain, islice(plain.prepare(0), COMPILED_STEPS)))
    for step, expected in zip(compiled, steps, strict=True):
        assert step == pytest.approx(expected, rel=COMPILED_TOLERANCE)


@pytest.mark.parametrize("name", COVER)
def test_the_compiler_traces_what_runs(
    workplace: Workplace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced(unit: Any, *, enabled: bool, **_: Any) -> Any:
        if not enabled:
            return unit
        return torch.compile(unit, backend="aot_eager", dynamic=False, fullgraph=True)

    monkeypatch.setattr(fastkd.build, "compile_unit", traced)
    monkeypatch.setattr(fastkd.teacher, "compile_unit", traced)
    compare_compiled(workplace, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_inductor_computes_what_runs(workplace: Workplace, name: str) -> None:
    compare_compiled(workplace, name)
