"""benchmarks/accuracy_runs.py: given again, it resumes; cycle_on_cifar10.py builds on it."""

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastkd.output.run_folder import RunFolder
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_finished_run_is_taken_and_an_unfinished_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    shared = import_module("accuracy_runs")
    ran = []
    monkeypatch.setattr(shared, "run_recipe", lambda *_, **how: ran.append(how) or {"new": 1})
    session, recipe = SimpleNamespace(root=tmp_path), load_recipe("quickstart")
    folder = tmp_path / recipe.name / f"20260101T000000Z-{recipe.digest()[:8]}"
    folder.mkdir(parents=True)
    assert shared.finished(recipe, session) == {"new": 1}
    assert ran == [{"resume": "auto"}]
    summary = {"digest": recipe.digest(), "accuracy_last": 0.5}
    RunFolder(folder).write_json("summary.json", summary)
    assert shared.finished(recipe, session) == summary
    assert len(ran) == 1


def test_cycles_are_compared_with_none_seed_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    cycles = import_module("cycle_on_cifar10")
    ran = []

    def finished(recipe: Recipe, _: Session) -> dict[str, Any]:
        ran.append((recipe.seed, recipe.augment.cycle, recipe.total_epochs, recipe.eval_epochs))
        lost = {None: 0.0, 10: 0.01, 5: 0.03 + 0.01 * recipe.seed}[recipe.augment.cycle]
        return {"accuracy_last": 0.6 + 0.02 * recipe.seed - lost, "history": [{"images_per_s": 1}]}

    monkeypatch.setattr(cycles, "finished", finished)
    teacher = {"weights": tmp_path / "teacher", "accuracy_last": 0.7}
    monkeypatch.setattr(cycles, "taught", lambda *_: teacher)
    monkeypatch.setattr(cycles, "RESULTS", tmp_path / "cycle_cifar10")
    words = ["--data", str(tmp_path), "--epochs", "20", "--write", "--seeds"]
    for seeds in ("1", "2"):
        # The first seed is made once, its rows are kept.
        monkeypatch.setattr("sys.argv", ["cycle_on_cifar10.py", *words, seeds])
        cycles.main()
    # A cycle of 30 would be the run without one.
    assert ran == [(seed, cycle, 20, 20) for seed in (0, 1) for cycle in (None, 10, 5)]
    written = (tmp_path / "cycle_cifar10.md").read_text()
    assert written in capsys.readouterr().out
    assert written.splitlines()[-3:] == [
        "| none | 2 | 61.00% | 1.41% |  |  |  |",
        "| 10 | 2 | 60.00% | 1.41% | -1.00 -1.00 | -1.00 | 0.00 |",
        "| 5 | 2 | 57.50% | 0.71% | -3.00 -4.00 | -3.50 | 0.50 |",
    ]
    rows = json.loads((tmp_path / "cycle_cifar10.json").read_text())["rows"]
    assert [(row["cycle"], row["seed"]) for row in rows] == [(c, s) for s, c, *_ in ran]
