"""benchmarks/cifar10_methods.py: given again, it resumes."""

from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastkd.output.run_folder import RunFolder
from fastkd.recipes.loading import load_recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_finished_run_is_taken_and_an_unfinished_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    methods = import_module("cifar10_methods")
    ran = []
    monkeypatch.setattr(methods, "run_recipe", lambda *_, **how: ran.append(how) or {"new": 1})
    session, recipe = SimpleNamespace(root=tmp_path), load_recipe("quickstart")
    folder = tmp_path / recipe.name / f"20260101T000000Z-{recipe.digest()[:8]}"
    folder.mkdir(parents=True)
    assert methods.finished(recipe, session) == {"new": 1}
    assert ran == [{"resume": "auto"}]
    summary = {"digest": recipe.digest(), "accuracy_last": 0.5}
    RunFolder(folder).write_json("summary.json", summary)
    assert methods.finished(recipe, session) == summary
    assert len(ran) == 1
