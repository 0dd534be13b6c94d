"""A sweep is one run per combination, continues after an interruption, and ends with one table."""

import csv
import json
import os
import re
import signal
import time

import pytest
import torch

import fastkd.data.sources.synthetic
import fastkd.runs.sweep.running
from fastkd.errors import Interrupted, RunFailed, UserError
from fastkd.output.console import Console
from fastkd.recipes.loading import load_recipe
from fastkd.runs.sweep.grid import combinations
from fastkd.runs.sweep.jobs import environments
from fastkd.runs.sweep.table import different_teachers
from fastkd.storage.weights import load_weights
from fastkd.testing.recipes import TINY

KEYS = [
    *TINY,
    "student.name=resnet8",
    "teacher=null",
    "losses.kd=null",
    "losses.ce.weight=1",
    "baseline.lrs=",
]
TAUGHT = [
    "teacher.name=resnet8",
    "teacher.train=true",
    "losses.kd.weight=1",
    "losses.kd.ce_weight=0",
]
SWEEP = ["--sweep", "optim.lr=0.1;0.2", "--sweep", "seed=0;1"]


@pytest.fixture(autouse=True)
def _few_validation_images(monkeypatch):
    monkeypatch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 50)


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
        (
            [*TAUGHT, "--sweep", "teacher.cache=null;answers"],
            "--sweep: teacher.cache=null and teacher.cache=answers are the same run, because "
            "teacher.cache cannot change what it learns; sweep over other keys",
        ),
        (["--sweep", "data.workers=0;2"], "--sweep: data.workers=0 and data.workers=2 are the sa"),
        (
            ["--sweep", "student.name=resnet8;nonet"],
            "--sweep: student.name=nonet: unknown network 'nonet'; nearest:",
        ),
        (
            ["--sweep", "student.name=resnet8;timm:nonet"],
            "--sweep: student.name=timm:nonet: timm has no network 'nonet'; nearest",
        ),
        (
            ["--sweep", "student.stem=null;cifar"],
            "--sweep: student.stem=cifar: resnet8 ",
        ),
        (["--sweep", "device=cpu;auto"], "--sweep cannot change device or deterministic"),
        ([*SWEEP, "out=run"], "a sweep makes a run folder for each value: remove out="),
        ([*SWEEP, "--dry-run"], "--sweep and --dry-run exclude each other"),
        ([*SWEEP, "--resume", "auto"], "--sweep and --resume exclude each other"),
        ([*SWEEP, "--print-config"], "--sweep and --print-config exclude each other"),
        (
            ["--jobs", "2"],
            "--jobs is for the runs of a --sweep; several GPUs for one run: tor",
        ),
        (["--launcher", "ray"], "--launcher is for the runs of a --sweep; several GPUs for one"),
        ([*SWEEP, "--launcher", "slurm"], "--launcher slurm: choose ray, ray:ADDRESS or submitit,"),
        ([*SWEEP, "--launcher", "submitit:fast"], "--launcher submitit:fast: expected submitit's"),
        ([*SWEEP, "--jobs", "0"], "argument --jobs: 0: expected a whole number above 0. See"),
        ([*SWEEP, "--jobs", "two"], "argument --jobs: two: expected a whole number above 0. See"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_sweep_is_found_before_its_first_run(command, tmp_path, words, sentence):
    said = command("train", *KEYS, *words)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"fastkd: {sentence}")
    assert not any(tmp_path.iterdir())


def runs_in(tmp_path):
    return [path for path in (tmp_path / "runs/quickstart").iterdir() if path.is_dir()]


def accuracies(tmp_path):
    found = (json.loads(file.read_text()) for file in tmp_path.rglob("summary.json"))
    return sorted(f"{run['accuracy_last']:.2%}" for run in found)


def table(said):
    """Rows of the last table: swept values, accuracy last, accuracy best."""
    lines = said.out[said.out.rindex("\nrun ") :].splitlines()
    rows = [line.split() for line in lines if "=" in line and "mean of" not in line]
    return [(" ".join(w for w in row if "=" in w), *[w for w in row if "%" in w]) for row in rows]


def test_a_sweep_runs_every_combination_and_ends_with_a_table(command, tmp_path):
    said = command("train", *KEYS, *SWEEP)
    assert (said.code, said.err) == (0, "")
    assert len(runs_in(tmp_path)) == 4
    rows = table(said)
    names = [" ".join(choice) for choice in combinations(SWEEP[1::2])]
    assert [row[0] for row in rows] == names
    assert sorted(row[1] for row in rows) == accuracies(tmp_path)
    (file,) = (tmp_path / "runs/quickstart").glob("sweep-*.csv")
    assert f"\ntable {file.relative_to(tmp_path)}\n" in said.out
    lines = [line for line in csv.DictReader(file.open()) if line["row"] == "run"]
    assert [" ".join(f"{k}={line[k]}" for k in ("optim.lr", "seed")) for line in lines] == names
    for line in lines:
        (run,) = (tmp_path / "runs/quickstart").glob(f"*-{line['digest'][:8]}/summary.json")
        summary = json.loads(run.read_text())
        for key in ("accuracy_last", "accuracy_best", "best_epoch", "params", "macs"):
            assert float(line[key]) == summary[key]


def test_a_broken_sweep_goes_on_and_repeats_nothing(command, tmp_path, monkeypatch):
    original = fastkd.runs.sweep.running.run_recipe
    runs = []

    def run(recipe, session, **options):
        runs.append((recipe.optim.lr, recipe.seed))
        if len(runs) == 3:
            raise Interrupted("stopped.", 130)
        return original(recipe, session, **options)

    monkeypatch.setattr(fastkd.runs.sweep.running, "run_recipe", run)
    said = command("train", *KEYS, *SWEEP)
    assert said.code == 130
    assert said.err.endswith("run the same command again to resume the whole sweep)\n")
    again = command("train", *KEYS, *SWEEP)
    assert again.code == 0
    assert runs == [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 0), (0.2, 1)]
    assert "sweep 2/4: optim.lr=0.1 seed=1, finished before\n" in again.out
    assert len(table(again)) == 4
    assert len(runs_in(tmp_path)) == 4


def test_a_run_that_fails_does_not_stop_the_others(command, tmp_path, monkeypatch):
    original = fastkd.runs.sweep.running.run_recipe

    def run(recipe, session, **options):
        if recipe.optim.lr == 0.1:
            raise RunFailed("it diverged")
        return original(recipe, session, **options)

    monkeypatch.setattr(fastkd.runs.sweep.running, "run_recipe", run)
    said = command("train", *KEYS, *SWEEP[:2])
    assert said.code == 1
    assert "failed: it diverged" in said.out
    rows = table(said)
    assert rows[0] == ("optim.lr=0.1",)
    (file,) = (tmp_path / "runs/quickstart").glob("sweep-*.csv")
    failed, done = csv.DictReader(file.open())
    assert (failed["note"], failed["accuracy_last"]) == ("failed", "")
    assert (done["note"], done["optim.lr"]) == ("at chance", "0.2")
    assert len(rows[1]) == 3


@pytest.mark.parametrize("jobs", [(), pytest.param(("--jobs", "2"), marks=pytest.mark.slow)])
def test_a_mistake_in_a_later_run_leaves_the_table_of_those_before(command, tmp_path, jobs):
    taps = "losses.at.pairs={stage1: stage1};{stage1: stage3};{stage1: stage9}"
    at = ("teacher.name=resnet8", "teacher.train=true", "teacher.min_accuracy=0", "epochs=1")
    words = [*KEYS[:9], "baseline.lrs=", *at, "losses.at.weight=1", "--sweep", taps]
    if jobs:
        # Of several at a time the sound ones may not have ended yet.
        sound = command("train", *words[:-1], "losses.at.pairs={stage1: stage1};{stage1: stage3}")
        assert sound.code == 0
    said = command("train", *words, *jobs)
    assert said.code == 2
    assert "unknown tap 'stage9'" in said.err
    lines = said.out[said.out.rindex("\nrun ") :].split("losses.at.pairs=")[1:]
    assert len(lines) == 3
    assert ["%" in line for line in lines] == [True, True, False]
    assert "not run" in lines[2]
    if not jobs:
        nothing = command("train", *words[:-1], "losses.at.pairs={stage1: stage8};{stage1: stage9}")
        assert nothing.code == 2
        assert "\nrun " not in nothing.out


def means(said):
    """Rows over seeds: what they share, mean of the last and best epoch, then the deviations."""
    row = r"^(.*?mean of \d) +([\d.]+)% +([\d.]+)% .*std ([\d.]+), ([\d.]+)"
    return [(name, *map(float, numbers)) for name, *numbers in re.findall(row, said.out, re.M)]


def test_over_seeds_there_is_mean_and_standard_deviation(command, tmp_path, monkeypatch):
    accuracies = {(0.1, 0): 0.5, (0.1, 1): 0.56, (0.1, 2): 0.53, (0.2, 0): 0.4, (0.2, 1): 0.44}

    def run(recipe, session, **options):
        if (recipe.optim.lr, recipe.seed) not in accuracies:
            raise RunFailed("it diverged")
        share = accuracies[recipe.optim.lr, recipe.seed]
        return {"accuracy_last": share, "accuracy_best": share + 0.1, "history": []}

    monkeypatch.setattr(fastkd.runs.sweep.running, "run_recipe", run)
    said = command("train", *KEYS, "--sweep", "optim.lr=0.1;0.2", "--sweep", "seed=0;1;2")
    # A run that failed is missing from its mean; the deviation is that of a sample.
    assert said.code == 1
    assert means(said) == [
        ("optim.lr=0.1 mean of 3", 53.0, 63.0, 3.0, 3.0),
        ("optim.lr=0.2 mean of 2", 42.0, 52.0, 2.83, 2.83),
    ]
    assert means(command("train", *KEYS, "--sweep", "optim.lr=0.1;0.2")) == []


TAUGHT = [
    *KEYS[:9],
    "baseline.lrs=",
    "teacher.name=resnet8",
    "teacher.width=0.25",
    "teacher.epochs=1",
    "teacher.min_accuracy=0",
]


def test_a_sweep_says_that_its_runs_havedifferent_teachers(command, tmp_path):
    said = command("train", *TAUGHT, "teacher.lr=0.1", "--sweep", "seed=0;1")
    assert (said.code, said.err) == (0, "")
    assert len(list((tmp_path / "runs/teachers").iterdir())) == 2
    reached = [
        json.loads(file.read_text())["teacher"]["accuracy"]
        for file in tmp_path.glob("runs/quickstart/*/summary.json")
    ]
    rows = [row for row in table(said) if row[1:]]
    assert sorted(row[3] for row in rows) == sorted(f"{one:.2%}" for one in reached)
    (mean,) = (line for line in said.out.splitlines() if line.startswith("mean of 2"))
    assert re.findall(r"[\d.]+%", mean)[2] == f"{sum(reached) / 2:.2%}"
    note = "note: these runs imitate 2 different teachers, each trained like its run"
    assert said.out.splitlines()[-1].startswith(note)
    # One of them is the first run's: what is there is used.
    held = command("train", *TAUGHT, "teacher.lr=0.1", "teacher.seed=0", "--sweep", "seed=0;1")
    assert "different teachers" not in held.out
    assert len(list((tmp_path / "runs/teachers").iterdir())) == 2


def test_a_teacher_s_seed_decides_all_of_its_training(command, tmp_path):
    """Also the order in which it sees the images, which a run's own seed decides for the run."""
    for seed in (1, 2):
        words = ("teacher.seed=7", "teacher.lr=0.1", f"seed={seed}", f"out=run{seed}")
        assert command("train", *TAUGHT, *words).code == 0
        (tmp_path / "runs/teachers").rename(tmp_path / f"teachers{seed}")
    one, two = (load_weights(next(tmp_path.glob(f"teachers{s}/*")))[0] for s in (1, 2))
    assert one and all(torch.equal(one[key], two[key]) for key in one)
    assert command("train", *TAUGHT, "teacher.lr=0.1", "seed=2", "out=other").code == 0
    other, _ = load_weights(next(tmp_path.glob("runs/teachers/*")))
    assert not torch.equal(other["conv1.weight"], one["conv1.weight"])


@pytest.mark.parametrize(
    ("words", "axes", "num"),
    [
        (("teacher.lr=null",), ("seed=0;1", "optim.lr=0.05;0.1"), 4),
        (("teacher.seed=3", "teacher.lr=0.2"), ("seed=0;1", "optim.lr=0.05;0.1"), None),
        (("teacher.seed=3",), ("seed=0;1", "epochs=1;2"), None),
        (("teacher.epochs=null",), ("epochs=1;2",), 2),
        ((), ("batch_size=16;32",), 2),
        (("teacher.ensemble.0.name=vgg8", "teacher.ensemble.0.train=true"), ("seed=1;2",), 2),
        (("teacher.weights=t.pt",), ("seed=0;1", "batch_size=16;32"), None),
        ((), ("teacher.lr=0.1;0.2", "student.block=S;G:2"), None),
        (("teacher=null", "losses.kd=null", "losses.ce.weight=1"), ("seed=0;1",), None),
    ],
)
def test_different_teachers_are_counted(words, axes, num):
    recipes = {
        choice: load_recipe("quickstart", overrides=[*TAUGHT, *words, *choice])
        for choice in combinations(axes)
    }
    note = different_teachers(recipes)
    assert f"imitate {num} different teachers" in note if num else note == ""


def test_the_mean_over_seeds_stands_beside_the_papers(command, monkeypatch, tmp_path):
    def run(recipe, session, **options):
        share = 0.9 + recipe.seed / 100
        return {"accuracy_last": share, "accuracy_best": share, "history": []}

    monkeypatch.setattr(fastkd.runs.sweep.running, "run_recipe", run)
    name = "alignkd/cifar100/resnet18--plain18/alignkd"
    said = command("train", name, "data.root=.", "--sweep", "seed=0;2")
    assert means(said) == [("mean of 2", 91.0, 91.0, 1.41, 1.41)]
    assert re.search(r"^paper, Table \d", said.out[said.out.index("mean of 2") :], re.M)


def test_a_run_that_was_broken_off_goes_on_where_it_was(command, tmp_path, monkeypatch):
    """Not only is what is finished not repeated: the second run goes on in its second epoch."""
    original = Console.epoch

    def epoch(self, row, epochs):
        original(self, row, epochs)
        if len(list(tmp_path.glob("runs/quickstart/*"))) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    words = ("train", *KEYS, "epochs=2", "save_steps=1", "--sweep", "student.block=S;G:2;G:4")
    with monkeypatch.context() as patch:
        patch.setattr(Console, "epoch", epoch)
        said = command(*words)
    assert said.code == 130
    assert said.err.endswith("run the same command again to resume the whole sweep)\n")
    again = command(*words)
    assert (again.code, again.err) == (0, "")
    assert "sweep 1/3: student.block=S, finished before\n" in again.out
    assert re.search(r"sweep 2/3: student.block=G:2\n.*\nresum.* epoch [12]", again.out)
    assert [row[0] for row in table(again)] == [f"student.block={b}" for b in ("S", "G:2", "G:4")]
    assert len(runs_in(tmp_path)) == 3


def test_runs_go_side_by_side(command, tmp_path):
    """One of them diverges, which does not stop the others."""
    words = ("--sweep", "optim.lr=0.1;1e30;0.2", "--jobs", "2")
    said = command("train", *KEYS, "max_skips=1", "epochs=2", *words)
    assert said.code == 1
    rows = table(said)
    assert [row[0] for row in rows] == ["optim.lr=0.1", "optim.lr=1e30", "optim.lr=0.2"]
    assert [len(row) for row in rows] == [3, 1, 3]
    assert sorted([rows[0][1], rows[2][1]]) == accuracies(tmp_path)
    assert "sweep 2/3: optim.lr=1e30: failed (exit code 1): " in said.out
    # Two at once, the third on the first free place.
    first, second, third = (said.out.index(f"optim.lr={lr}, job") for lr in ("0.1", "1e30", "0.2"))
    ends = [said.out.index(text) for text in ("optim.lr=0.1: done", "optim.lr=1e30: failed")]
    assert max(first, second) < min(ends) < third
    logs = list((tmp_path / "runs/quickstart").glob("sweep-*.log"))
    assert len(logs) == 3
    machines = (json.loads(file.read_text()) for file in tmp_path.rglob("environment.json"))
    share = max(1, torch.get_num_threads() // 2)
    assert [machine["threads"] for machine in machines] == [share] * 3


def test_a_mistake_that_a_process_finds_is_told_once(command, tmp_path):
    words = ("data.name=folder", "data.root=none", "--sweep", "seed=0;1", "--jobs", "2")
    said = command("train", *KEYS[3:], "student.name=resnet8", *words)
    assert said.code == 2
    assert said.err.startswith("fastkd: sweep ")
    assert f": data.root={tmp_path}/none is not a folder" in said.err
    assert said.err.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_saves_all_runs_that_go_side_by_side(start, tmp_path):
    words = [*KEYS, "epochs=500", "--sweep", "seed=0;1;2", "--jobs", "2"]
    sweep = start("-m", "fastkd.train", *words, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("runs/quickstart/*/last.pt"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    sweep.send_signal(signal.SIGINT)
    _, said = sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    assert said.splitlines()[-1] == (
        "fastkd: stopped with 2 runs under way; run the same command again to resume the whole "
        "sweep"
    )
    logs = [file.read_text() for file in tmp_path.glob("runs/quickstart/sweep-*.log")]
    assert len(logs) == 2
    assert all("the state is saved" in log for log in logs)


def test_each_job_has_a_gpu_of_its_own(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in environments(cuda, 2)] == ["0", "1"]
    share = str(max(1, torch.get_num_threads() // 2))
    assert {place["OMP_NUM_THREADS"] for place in environments(cuda, 2)} == {share}
    with pytest.raises(UserError, match="--jobs=4: this machine shows 3 GPUs"):
        environments(cuda, 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-ab12")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in environments(cuda, 2)] == ["5", "GPU-ab12"]
