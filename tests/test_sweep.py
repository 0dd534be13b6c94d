"""A sweep is one run per combination, goes on where it was broken off, and ends with one table."""

import json

import pytest

import fastkd.data.synthetic
import fastkd.sweep
from fastkd.errors import Interrupted, RunFailed, UserError
from fastkd.sweep import combinations

KEYS = [
    *("data.name=synthetic", "data.train_limit=64", "student.name=resnet8", "student.width=0.5"),
    *("batch_size=32", "epochs=1", "precision=fp32", "compile=off", "device=cpu"),
    *("teacher=null", "losses.kd=null", "losses.ce.weight=1", "baseline.lrs="),
]
SWEEP = ["--sweep", "optim.lr=0.1;0.2", "--sweep", "seed=0;1"]


@pytest.fixture(autouse=True)
def _few_validation_images(monkeypatch):
    monkeypatch.setitem(fastkd.data.synthetic.NUM_IMAGES, "val", 50)


def test_all_combinations_the_last_key_fastest():
    assert combinations(["optim.lr=0.1;0.2", "seed=0;1"]) == [
        ("optim.lr=0.1", "seed=0"),
        ("optim.lr=0.1", "seed=1"),
        ("optim.lr=0.2", "seed=0"),
        ("optim.lr=0.2", "seed=1"),
    ]


def test_a_comma_stays_a_list():
    assert combinations(["optim.milestones=10,20;15,25"]) == [
        ("optim.milestones=10,20",),
        ("optim.milestones=15,25",),
    ]


@pytest.mark.parametrize(
    ("sweeps", "sentence"),
    [
        (["optim.lr=0.1"], "expected a key and at least two values, in quotes"),
        (["optim.lr=0.1;"], "expected a key and at least two values, in quotes"),
        (["=1;2"], "expected a key and at least two values, in quotes"),
        (["optim.lr"], "expected a key and at least two values, in quotes"),
        (["seed=0;1", "seed=2;3"], "--sweep names seed twice: join the values by semicolons"),
    ],
)
def test_a_misspelled_sweep_is_refused(sweeps, sentence):
    with pytest.raises(UserError, match=sentence):
        combinations(sweeps)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sweep", "optim.lr=0.1;fast"], "optim.lr=fast: expected a number above 0"),
        (["--sweep", "optim.lr=0.1;0.10"], "--sweep: optim.lr=0.1 and optim.lr=0.10 are the same"),
        (["--sweep", "data.workers=0;2"], "--sweep: data.workers=0 and data.workers=2 are the sa"),
        (["--sweep", "device=cpu;auto"], "--sweep cannot change device or deterministic"),
        ([*SWEEP, "out=run"], "a sweep makes a run folder for each value: leave out= away"),
        ([*SWEEP, "--dry-run"], "--sweep and --dry-run exclude each other"),
        ([*SWEEP, "--resume", "auto"], "--sweep and --resume exclude each other"),
        ([*SWEEP, "--print-config"], "--sweep and --print-config exclude each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_sweep_is_found_before_its_first_run(command, tmp_path, words, sentence):
    said = command("train", *KEYS, *words)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"fastkd: {sentence}")
    assert not any(tmp_path.iterdir())


def accuracies(tmp_path):
    found = (json.loads(file.read_text()) for file in tmp_path.rglob("summary.json"))
    return sorted(f"{run['accuracy_last']:.2%}" for run in found)


def table(said):
    """Rows of the last table: swept values, accuracy last, accuracy best."""
    lines = said.out[said.out.rindex("\nrun ") :].splitlines()
    rows = [line.split() for line in lines if "=" in line]
    return [(" ".join(w for w in row if "=" in w), *[w for w in row if "%" in w]) for row in rows]


def test_a_sweep_runs_every_combination_and_ends_with_a_table(command, tmp_path):
    said = command("train", *KEYS, *SWEEP)
    assert (said.code, said.err) == (0, "")
    assert len(list((tmp_path / "runs/quickstart").iterdir())) == 4
    rows = table(said)
    names = [" ".join(choice) for choice in combinations(SWEEP[1::2])]
    assert [row[0] for row in rows] == names
    assert sorted(row[1] for row in rows) == accuracies(tmp_path)


def test_a_broken_sweep_goes_on_and_repeats_nothing(command, tmp_path, monkeypatch):
    original = fastkd.sweep.run_recipe
    runs = []

    def run(recipe, session, **options):
        runs.append((recipe.optim.lr, recipe.seed))
        if len(runs) == 3:
            raise Interrupted("stopped.", 130)
        return original(recipe, session, **options)

    monkeypatch.setattr(fastkd.sweep, "run_recipe", run)
    said = command("train", *KEYS, *SWEEP)
    assert said.code == 130
    assert said.err.endswith("the whole sweep goes on with its own command)\n")
    again = command("train", *KEYS, *SWEEP)
    assert again.code == 0
    assert runs == [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 0), (0.2, 1)]
    assert "sweep 2/4: optim.lr=0.1 seed=1, finished before\n" in again.out
    assert len(table(again)) == 4
    assert len(list((tmp_path / "runs/quickstart").iterdir())) == 4


def test_a_run_that_fails_does_not_stop_the_others(command, tmp_path, monkeypatch):
    original = fastkd.sweep.run_recipe

    def run(recipe, session, **options):
        if recipe.optim.lr == 0.1:
            raise RunFailed("it diverged")
        return original(recipe, session, **options)

    monkeypatch.setattr(fastkd.sweep, "run_recipe", run)
    said = command("train", *KEYS, *SWEEP[:2])
    assert said.code == 1
    assert "failed: it diverged" in said.out
    rows = table(said)
    assert rows[0] == ("optim.lr=0.1",)
    assert len(rows[1]) == 3
