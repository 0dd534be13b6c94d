"""`fastkd compare` and `fastkd table`: recipes, seeds and paired baselines in one table."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

import fastkd.data.sources.synthetic
import fastkd.runs.sweep.running
from fastkd.output.console import Console
from fastkd.recipes.loading import load_recipe
from fastkd.report.gains import gains
from fastkd.report.labels import LONG, labels
from fastkd.runs.sweep.baselines import with_baselines

PAIR = "cifar10/resnet56--resnet20"
KEYS = ["data.root=.", "device=cpu", "precision=fp32"]


def accuracy(recipe):
    """Another number for every run that has anything to do with the tests."""
    method = 0.0 if recipe.teacher is None else 0.02 * (1 + ["kd", "at"].index(recipe.name[-2:]))
    block = 0.0 if recipe.student.block is None else -0.1
    rate = 0.0 if recipe.optim.lr < 0.3 else 0.005
    return 0.6 + method + block + rate + (0.003, 0.011, -0.004)[recipe.seed] * (1 + 10 * method)


@pytest.fixture
def ran(monkeypatch):
    """What was run, in order; nothing is trained."""
    runs = []

    def run(recipe, session, **options):
        runs.append(recipe)
        share = accuracy(recipe)
        return {
            "accuracy_last": share,
            "accuracy_best": share + 0.01,
            "best_epoch": 7,
            "params": 270_000 if recipe.student.block is None else 90_000,
            "macs": 41_000_000,
            "images_per_s": 1000.0 + recipe.seed,
            "teacher": {"accuracy": 0.7} if recipe.teacher else None,
            "alone": None,
        }

    monkeypatch.setattr(fastkd.runs.sweep.running, "run_recipe", run)
    return runs


def compared(command, *words):
    said = command("compare", *KEYS, *words)
    assert (said.code, said.err) == (0, "")
    (file,) = Path.cwd().rglob("sweep-*.csv")
    return said, list(csv.DictReader(file.open()))


def test_every_recipe_and_seed_is_run_and_each_student_alone_once(command, tmp_path, ran):
    said, lines = compared(command, f"{PAIR}/kd", f"{PAIR}/at", "--seeds", "3")
    assert "6 runs, and 3 of students alone to compare with (baseline.lrs= omits" in said.out
    alone = [run for run in ran if run.teacher is None]
    assert [run.seed for run in alone] == [0, 1, 2]
    assert {run.name for run in alone} == {"alone/cifar10/resnet20"}
    taught = [(run.name, run.seed) for run in ran if run.teacher]
    assert taught == [(f"{PAIR}/{method}", seed) for method in ("kd", "at") for seed in range(3)]
    # The same budget, data and student; only teacher and losses differ.
    kd, base = (one.model_dump() for one in (ran[3], alone[0]))
    differing = {key for key in kd if kd[key] != base[key]}
    assert differing <= {"name", "description", "teacher", "losses", "baseline"}
    assert [line["row"] for line in lines[:9]] == ["run"] * 9


def test_means_errors_and_gains_are_numpys(command, tmp_path, ran):
    said, lines = compared(command, f"{PAIR}/kd", f"{PAIR}/at", "--seeds", "3")
    reached = {(run.name, run.seed): accuracy(run) for run in ran}
    for name in (f"{PAIR}/kd", f"{PAIR}/at"):
        values = np.array([reached[name, seed] for seed in range(3)])
        base = np.array([reached["alone/cifar10/resnet20", seed] for seed in range(3)])
        rows = {line["row"]: line for line in lines if line["recipe"] == name and not line["seed"]}
        for row, of in (
            ("mean", np.mean),
            ("standard deviation", lambda x: np.std(x, ddof=1)),
            ("standard error", lambda x: np.std(x, ddof=1) / np.sqrt(3)),
        ):
            assert float(rows[row]["accuracy_last"]) == pytest.approx(of(values))
            assert float(rows[row]["accuracy_best"]) == pytest.approx(of(values + 0.01))
            # Paired: the error of the differences, not that of two means.
            assert float(rows[row]["gain"]) == pytest.approx(of(values - base))
        assert rows["mean"]["runs"] == "3"
        assert (rows["mean"]["params"], rows["mean"]["macs"]) == ("270000", "41000000")
        assert float(rows["mean"]["images_per_s"]) == 1001
        error = np.std(values - base, ddof=1) / np.sqrt(3)
        gain = f"{100 * np.mean(values - base):+.2f} +- {100 * error:.2f}"
        assert re.search(rf"^{name[-2:]} mean of 3 .* {re.escape(gain)} ", said.out, re.M)
    for line in lines:
        if line["row"] == "run" and not line["recipe"].startswith("alone/"):
            expected = reached[line["recipe"], int(line["seed"])]
            expected -= reached["alone/cifar10/resnet20", int(line["seed"])]
            assert float(line["gain"]) == pytest.approx(expected)


def test_a_gain_is_over_the_best_rate_that_was_named(command, tmp_path, ran):
    words = (f"{PAIR}/kd", "--seeds", "2", "baseline.lrs=0.1,0.4")
    _, lines = compared(command, *words)
    assert sorted(run.optim.lr for run in ran if run.teacher is None) == [0.1, 0.1, 0.4, 0.4]
    assert all(not run.baseline.lrs for run in ran)
    kd = next(line for line in lines if line["recipe"] == f"{PAIR}/kd")
    best = max(accuracy(run) for run in ran if run.teacher is None and run.seed == 0)
    assert float(kd["gain"]) == pytest.approx(float(kd["accuracy_last"]) - best)


def test_without_baselines_there_is_no_gain(command, tmp_path, ran):
    said, lines = compared(command, f"{PAIR}/kd", "--seeds", "2", "baseline.lrs=")
    assert all(run.teacher for run in ran)
    assert "gain" not in said.out
    assert {line["gain"] for line in lines} == {""}


def test_sweeps_of_keys_share_the_baselines_that_do_not_differ(command, tmp_path, ran):
    sweeps = ("--sweep", "student.block=S;G:4", "--sweep", "losses.kd.temperature=1;4")
    _, lines = compared(command, f"{PAIR}/kd", "--seeds", "2", *sweeps)
    assert len([run for run in ran if run.teacher]) == 8
    alone = [(str(run.student.block), run.seed) for run in ran if run.teacher is None]
    assert len(alone) == len(set(alone)) == 4
    for line in lines:
        if line["row"] == "run" and line["recipe"].startswith("alone/"):
            assert line["student.block"] in ("S", "G:4")
            assert line["losses.kd.temperature"] == ""
        elif line["row"] == "run":
            assert line["gain"] != ""


def test_recipes_can_be_swept_in_train_too(command, tmp_path, ran):
    said = command("train", *KEYS, "--sweep", f"recipe={PAIR}/kd;{PAIR}/at", "--sweep", "seed=0;1")
    assert (said.code, said.err) == (0, "")
    assert [run.name[-2:] for run in ran] == ["kd", "kd", "at", "at"]
    assert re.search(r"^recipe=cifar10/resnet56--resnet20/kd seed=0|^kd seed=0 ", said.out, re.M)


WRONG = [
    ((), "name the recipes to compare: fastkd compare RECIPE RECIPE"),
    (("--seeds", "3"), "name the recipes to compare"),
    ((f"{PAIR}/kd", "--seeds", "0"), "argument --seeds: 0: expected a whole number above 0"),
    ((f"{PAIR}/kd", "--seeds", "2", "seed=3"), "--seeds 2 and seed=3 exclude each other"),
    (
        (f"{PAIR}/kd", "--seeds", "2", "--sweep", "seed=3;4"),
        "--seeds 2 and seed=3;4 exclude each other",
    ),
    ((f"{PAIR}/kd", "--sweep", "recipe=a;b"), "compare takes recipes by name"),
    ((f"{PAIR}/kdd",), "there is no recipe"),
    ((f"{PAIR}/kd", "out=run"), "a sweep makes a run folder for each value: remove out="),
    (("mine.yaml",), "mine.yaml is a file, and compare takes named recipes"),
    ((f"{PAIR}/kd", "optim.lrr=1"), "optim.lrr"),
]


@pytest.mark.parametrize(("words", "sentence"), WRONG, ids=str)
def test_a_wrong_comparison_is_one_sentence(command, tmp_path, ran, words, sentence):
    said = command("compare", "data.root=.", *words)
    assert (said.code, ran, said.out) == (2, [], "")
    assert sentence in said.err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((f"{PAIR}/kd", f"{PAIR}/at"), f"fastkd compare {PAIR}/kd {PAIR}/at"),
        ((f"{PAIR}/kd", "--sweep", f"recipe={PAIR}/kd;{PAIR}/at"), f"remove {PAIR}/kd"),
    ],
)
def test_train_says_how_several_recipes_are_run(command, words, sentence):
    said = command("train", *KEYS, *words)
    assert said.code == 2
    assert sentence in said.err


def test_gains_take_a_runs_own_baseline_before_another(tmp_path):
    kd = load_recipe(f"{PAIR}/kd", overrides=["data.root=."])
    every, number = with_baselines({("recipe=kd",): kd}, as_named=False)
    (alone, taught), base = every, {"accuracy_last": 0.5}
    assert number == 1
    assert gains(every, {alone: base, taught: {"accuracy_last": 0.6}}) == {
        taught: pytest.approx(0.1)
    }
    own = {"accuracy_last": 0.6, "alone": {"accuracy_last": 0.58}}
    assert gains(every, {alone: base, taught: own}) == {taught: pytest.approx(0.02)}
    # Of a run that failed there is none, nor over one; another seed is no pair.
    assert gains(every, {alone: {"note": "failed"}, taught: {"accuracy_last": 0.6}}) == {}
    assert gains(every, {alone: base, taught: {"note": "failed"}}) == {}
    other = every | {taught: kd.model_copy(update={"seed": 5})}
    assert gains(other, {alone: base, taught: {"accuracy_last": 0.6}}) == {}


LABELS = [
    (
        ["optim.lr=0.1 seed=0", "optim.lr=0.2 seed=0"],
        ["optim.lr=0.1 seed=0", "optim.lr=0.2 seed=0"],
    ),
    (
        [f"recipe={PAIR}/{m} student.block=G:4 seed={s}" for m in ("kd", "dkd") for s in "01"],
        ["kd seed=0", "kd seed=1", "dkd seed=0", "dkd seed=1"],
    ),
    (
        ["recipe=kdda/cifar100/resnet56--resnet20/kd", "recipe=kdda/cifar100/vgg13--vgg8/kd"],
        ["resnet56--resnet20", "vgg13--vgg8"],
    ),
    (
        [f"recipe={PAIR}/kd seed=0", f"recipe={PAIR}/at seed=0", "recipe=alone/cifar10/x seed=0"],
        ["kd", "at", "alone"],
    ),
    (
        [
            "student.weights=/data/somewhere/one/best.pt",
            "student.weights=/data/somewhere/two/best.pt",
        ],
        ["student.weights=one", "student.weights=two"],
    ),
    (
        [f"augment.pick.update_statistics=true optim.warmup_epochs={n}" for n in (1, 2)]
        + ["augment.pick.update_statistics=false optim.warmup_epochs=1"],
        [
            "update_statistics=true warmup_epochs=1",
            "update_statistics=true warmup_epochs=2",
            "update_statistics=false warmup_epochs=1",
        ],
    ),
    (
        [
            f"student.width={w} teacher.width=1 losses.kd.temperature={t} seed=0"
            for w in ("0.25", "0.5")
            for t in ("1.0", "4.0")
        ],
        [
            "width=0.25 temperature=1.0",
            "width=0.25 temperature=4.0",
            "width=0.5 temperature=1.0",
            "width=0.5 temperature=4.0",
        ],
    ),
]


@pytest.mark.parametrize(("given", "short"), LABELS)
def test_names_are_as_short_as_they_stay_unique(given, short):
    choices = [tuple(one.split()) for one in given]
    named = list(labels(choices).values())
    assert len(set(named)) == len(named)
    if max(map(len, given)) <= LONG:
        assert named == given
    else:
        assert named == short


def test_a_loss_without_keys_is_named_by_itself():
    given = ["{kd: {}}", "{kd: {weight: 0.25, temperature: 4}}"]
    named = labels([(f"losses={one}",) for one in given])
    assert list(named.values()) == ["kd", "kd weight=0.25 temperature=4"]


def test_losses_are_named_by_themselves():
    given = ["{kd: {weight: 0.9, ce_weight: 0.1}}", "{ce: {weight: 1}, dist: {weight: 1}}"]
    choices = [(f"losses={one}", f"seed={seed}") for one in given for seed in (0, 1)]
    assert list(labels(choices).values()) == [
        "kd seed=0",
        "kd seed=1",
        "ce+dist seed=0",
        "ce+dist seed=1",
    ]
    # The same losses with other weights: what differs.
    given = [f"{{kd: {{weight: 0.9, temperature: {t}}}, ce: {{weight: 1}}}}" for t in (1, 4)]
    named = list(labels([(f"losses={one}",) for one in given]).values())
    assert named == ["kd+ce temperature=1", "kd+ce temperature=4"]


QUICK = [
    "data.name=synthetic",
    "data.train_limit=64",
    "student.width=0.5",
    "batch_size=32",
    "epochs=1",
    "precision=fp32",
    "compile=off",
    "device=cpu",
    "teacher.name=resnet8",
    "teacher.width=0.25",
    "teacher.epochs=1",
    "teacher.min_accuracy=0",
    "teacher.seed=0",
]


def test_a_real_comparison_repeats_nothing_and_table_shows_the_same(command, tmp_path, monkeypatch):
    monkeypatch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 50)
    words = ("quickstart", *QUICK, "baseline.lrs=0.1", "--seeds", "2", "--markdown", "--latex")
    said = command("compare", *words)
    assert (said.code, said.err) == (0, "")
    (file,) = tmp_path.rglob("sweep-*.csv")
    lines = list(csv.DictReader(file.open()))
    summaries = {
        json.loads(file.read_text())["digest"]: json.loads(file.read_text())
        for file in tmp_path.glob("runs/*/**/summary.json")
        if "teachers" not in file.parts
    }
    assert len(summaries) == 4
    runs = [line for line in lines if line["row"] == "run"]
    for line in runs:
        assert float(line["accuracy_last"]) == summaries[line["digest"]]["accuracy_last"]
    alone, taught = runs[:2], runs[2:]
    for base, one in zip(alone, taught, strict=True):
        expected = float(one["accuracy_last"]) - float(base["accuracy_last"])
        assert float(one["gain"]) == pytest.approx(expected)
    tabular = said.out[said.out.index("\\begin{tabular}") : said.out.index("\\end{tabular}")]
    assert tabular.count("\\\\") == 1 + 4 + 2
    markdown = [line for line in said.out.splitlines() if line.startswith("| ")]
    assert len(markdown) == 2 + 4 + 2
    again = command("compare", *words)
    assert again.code == 0
    assert again.out.count("finished before") == 4
    assert [line for line in again.out.splitlines() if line.startswith("| ")] == markdown

    folders = [str(one.parent) for one in (tmp_path / "runs").glob("*/**/summary.json")]
    folders = [one for one in folders if "teachers" not in one]
    table = command("table", *folders, "--markdown")
    assert (table.code, table.err) == (0, "")
    cells = {tuple(line.split(" | ")[1:-1]) for line in table.out.splitlines()}
    assert cells == {tuple(line.split(" | ")[1:-1]) for line in markdown}
    single = command("table", folders[0], "--markdown")
    assert single.out.splitlines()[-1].startswith(("| quickstart ", "| alone/"))
    # A verdict that the run has stored is told; a run of an older version has none.
    summary = Path(folders[0]) / "summary.json"
    stored = {key: value for key, value in json.loads(summary.read_text()).items()}
    for kept in ({"verdict": "at chance"}, {}):
        stored.pop("verdict", None)
        summary.write_text(json.dumps(stored | kept))
        told = command("table", folders[0], "--markdown").out
        assert ("| at chance |" in told) == bool(kept)
    # What is not finished is left out; what is none is refused.
    (Path(folders[0]) / "summary.json").unlink()
    left = command("table", *folders)
    assert left.code == 0
    assert "is not finished and left out" in left.err
    wrong = command("table", str(tmp_path))
    assert wrong.code == 2
    assert "is not a run folder" in wrong.err
    assert command("table").code == 2


def test_a_table_in_a_pipe_folds_no_name():
    out = io.StringIO()
    name = "losses={kd: {weight: 0.9}} student.block=BG:2:M:8 seed=0 and more of it"
    Console(file=out).comparison([{"run": name, "accuracy_last": 0.5, "note": "some long note"}])
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("losses")]
    assert line.startswith(name)
    assert line.rstrip().endswith("some long note")


@pytest.mark.parametrize("width", [60, 70, 80, 100, 200])
def test_a_table_fits_the_terminal_by_leaving_out_columns(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    rows = [
        {
            "run": f"dkd student.block=G:4 seed={seed}",
            "accuracy_last": 0.9123,
            "accuracy_best": 0.9234,
            "gain": 0.0135,
            "gain_se": 0.0027,
            "of_teacher": 0.95,
            "params": 270_000,
            "macs": 41_000_000,
            "images_per_s": 12_345.0,
            "note": "a note of it",
        }
        for seed in range(2)
    ]
    with Console(file=out, live=True) as console:
        console.comparison(rows)
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for seed in range(2):
        assert f"dkd student.block=G:4 seed={seed}" in text
    assert text.count("91.23%") == text.count("+1.35 +- 0.27") == 2
    assert ("12,345" in text) == (width > 100)
    assert "…" not in text
