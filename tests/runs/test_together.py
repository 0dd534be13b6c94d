"""Runs that are trained together end with the bits that they have alone, whatever ends the others.

The truth is the same sweep, one run after another in folders of their own: weights, last.pt, rows
and summaries must be equal, except for clocks.
"""

import os
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import fastkd.data.sources.synthetic
from fastkd.compute.ranks import World
from fastkd.data.loaders.resident import ResidentLoader
from fastkd.errors import RunFailed, UserError
from fastkd.losses.logits import KD
from fastkd.models import create_model
from fastkd.output.console import Console
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.report import plots
from fastkd.runs.stages import Session
from fastkd.runs.sweep.grid import Choice, combinations
from fastkd.runs.sweep.grouping import grouped, in_words
from fastkd.runs.sweep.running import run_sweep
from fastkd.runs.sweep.table import same_images
from fastkd.storage.weights import describe, save_weights
from fastkd.teachers.teacher import Teacher
from fastkd.testing.recipes import TINY
from fastkd.training.config import OptimConfig
from fastkd.training.settings import TrainingSettings
from fastkd.training.sharing import SharedBatches
from fastkd.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "programs"))
import tiny
from tiny_trainer import data_of, make_trainer

STEPS = 4
X = ("augment.xprime=none", "losses.kd.views=x")
PICKED = ("augment.pick.criterion=kl", "augment.pick.images=16")
KD_ON_BOTH = "kd: {weight: 0.9, ce_weight: 0.1, views: [x, xprime]}"
TWO_TEACHERS = (
    *X,
    "teacher.ensemble.0.name=wrn_10_1",
    "teacher.ensemble.0.weights=../other.safetensors",
    "teacher.ensemble.0.resolution=12",
    "teacher.ensemble.0.min_accuracy=0",
)
# Keys of all runs, and what is swept.
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "losses": (
        X[:1],
        (
            "losses={kd: {weight: 0.9, ce_weight: 0.1}};{dkd: {weight: 1}, ce: {weight: 1}};"
            "{dist: {weight: 1}, ce: {weight: 1}}",
        ),
    ),
    "students": (X, ("student.name=resnet8;resnet14",)),
    "rates and optimizers": ((), ("optim.lr=0.05;0.1", "optim.name=sgd;adamw")),
    "seeds of weights": (("data.seed=3",), ("seed=0;1;2",)),
    "picks": (PICKED, ("augment.pick.criterion=kl;student_entropy;teacher_entropy",)),
    "sizes of picks": (PICKED, ("augment.pick.images=16;20",)),
    "two teachers": (TWO_TEACHERS, ("losses.kd.temperature=2;4",)),
    "micro-batches": ((), ("accumulate=1;4",)),
    "mixed targets": (
        (),
        (f"losses={{{KD_ON_BOTH}}};{{mixed_ce: {{weight: 1}}, {KD_ON_BOTH}}}",),
    ),
    "views that come again": ((*X, "augment.cycle=1"), ("losses.kd.temperature=2;4",)),
    "averages": (X, ("ema=null;0.9",)),
    "epochs": (X, ("epochs=1;3",)),
    "taps": (
        ("augment.xprime=none", "losses.kd=null", "losses.at.pairs.stage2=stage2"),
        ("losses.at.weight=10;100",),
    ),
    "the teacher's stages": (
        (
            "losses.kd=null",
            "augment.xprime=none",
            "losses.ce.weight=1",
            "losses.jointrd.stages=stage1,stage2,stage3",
        ),
        ("losses.jointrd.weight=1;2",),
    ),
    "memory banks": (
        (*X, "losses.crd.negatives=20", "losses.crd.dim=8"),
        ("losses.crd.weight=1;2",),
    ),
    "what is random about x": (
        (
            *X,
            "augment.policy=trivial",
            "augment.erasing=0.5",
            "augment.mixup=0.3",
            "augment.cutmix=1",
            "augment.sizes=6,8",
        ),
        ("losses.kd.temperature=2;4",),
    ),
    "compiled": ((*X, "compile=on", "epochs=1"), ("losses.kd.temperature=2;4",)),
    "a teacher and baselines that are trained first": (
        (*X, "teacher.train=true", "teacher.weights=null", "baseline.lrs=0.05,0.1", "epochs=1"),
        ("losses.kd.temperature=2;4",),
    ),
}
QUICK = ("losses", "seeds of weights", "picks")
"""Of these; the others are left to the exhaustive run."""
RATES = ("--sweep", "optim.lr=0.05;0.1;0.2")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 20)
    monkeypatch.setattr(plots, "plot_curves", lambda *_: None)  # a second each


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A new working folder; where the teachers lie beside it is part of a recipe's digest."""
    root = tmp_path_factory.mktemp("together")
    torch.manual_seed(7)
    nets = {
        "teacher": create_model("resnet8", 10, width=0.5),
        "other": create_model("wrn_10_1", 10),
    }
    for name, model in nets.items():
        save_weights(root / f"{name}.safetensors", model, describe(model))

    def make(name: str) -> Path:
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny.RECIPE))
        return folder

    return make


@pytest.fixture
def train(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`fastkd train --config recipe.yaml WORDS` in a folder."""

    def run(folder: Path, *words: str) -> Any:
        monkeypatch.chdir(folder)
        return command("train", "--config", "recipe.yaml", *words)

    return run


def ends(folder: Path) -> dict[str, dict[str, Any]]:
    """What the finished runs below a working folder leave, by their digests."""
    summaries = (folder / "runs/tiny/kd").glob("*/summary.json")
    return {path.parent.name.partition("-")[2]: tiny.facts(path.parent) for path in summaries}


@pytest.fixture(scope="module")
def made_alone() -> dict[str, dict[str, Any]]:
    """What `rates_alone` has found once."""
    return {}


@pytest.fixture
def rates_alone(
    made_alone: dict[str, dict[str, Any]], place: Callable[[str], Path], train: Callable[..., Any]
) -> dict[str, dict[str, Any]]:
    """What the runs of RATES leave one after another, the truth of several tests."""
    if not made_alone:
        folder = place("alone")
        assert train(folder, *RATES).code == 0
        made_alone |= ends(folder)
    return made_alone


def check_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert {key: tiny.different(one[key], other[key]) for key in one} == {key: [] for key in one}


@pytest.mark.parametrize(
    "name",
    [one if one in QUICK else pytest.param(one, marks=pytest.mark.matrix) for one in CASES],
)
def test_runs_together_end_as_alone(
    place: Callable[[str], Path], train: Callable[..., Any], name: str
) -> None:
    words, axes = CASES[name]
    sweep = [word for axis in axes for word in ("--sweep", axis)]
    alone, together = place("alone"), place("together")
    said = train(alone, *words, *sweep)
    assert (said.code, said.err) == (0, "")
    said = train(together, *words, *sweep, "--together")
    assert (said.code, said.err) == (0, "")
    runs = ends(alone)
    assert len(runs) == len(combinations(axes))
    assert f"together: {len(runs)} runs in 1 group\n" in said.out
    check_same(ends(together), runs)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often batches of training images are cut, and how often a teacher is asked in a step."""
    found = Counter[str]()
    crops, asked = ResidentLoader._crops, Teacher.__call__

    def counted_crops(self: ResidentLoader, *given: Any) -> Tensor:
        found["batches"] += self.plan.train
        return crops(self, *given)

    def counted(self: Teacher, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found["answers"] += 1
        return asked(self, views)

    monkeypatch.setattr(ResidentLoader, "_crops", counted_crops)
    monkeypatch.setattr(Teacher, "__call__", counted)
    return found


@pytest.mark.parametrize(
    ("sweep", "runs", "times"),
    [
        (RATES, 3, 1),
        (("--sweep", "seed=0;1"), 2, 2),
        (("--sweep", "seed=0;1", "data.seed=0"), 2, 1),
        (("--sweep", "optim.lr=0.05;0.1", "--sweep", "augment.flip=true;false"), 4, 2),
    ],
    ids=lambda value: " ".join(value[1::2]) if isinstance(value, tuple) else "",
)
def test_a_batch_is_made_and_the_teacher_asked_once_for_a_group(
    place: Callable[[str], Path],
    train: Callable[..., Any],
    counts: Counter[str],
    sweep: tuple[str, ...],
    runs: int,
    times: int,
) -> None:
    folder = place("together")
    assert train(folder, *sweep, "--together").code == 0
    assert counts == {"batches": 2 * STEPS * times, "answers": 2 * STEPS * times}
    assert len(ends(folder)) == runs


def test_answers_that_are_kept_are_shared_too(
    place: Callable[[str], Path],
    train: Callable[..., Any],
    rates_alone: dict[str, Any],
    counts: Counter[str],
) -> None:
    together = place("together")
    counts.clear()
    assert train(together, *RATES, "teacher.cache=kept", "--together").code == 0
    assert counts == {"batches": 2 * STEPS, "answers": 2 * STEPS}
    found = {
        digest: {key: value for key, value in run.items() if not key.startswith("summary.answers")}
        for digest, run in ends(together).items()
    }
    check_same(found, rates_alone)
    # A further run of the same sweep reads them.
    counts.clear()
    words = ("--sweep", "losses.kd.temperature=2;8", "teacher.cache=kept", "--together")
    assert train(together, *words).code == 0
    assert counts == {"batches": 2 * STEPS}


NOTE = (
    "note: the seeds share the order of the images and all views of them (data.seed): what they "
    "differ by comes from initial weights and dropout alone"
)


@pytest.mark.parametrize(
    ("axis", "key", "note"),
    [
        ("seed=0;1", "data.seed=0", NOTE),
        ("seed=0;1", "data.seed=null", ""),
        ("optim.lr=0.05;0.1", "data.seed=0", ""),
    ],
)
def test_the_table_says_whether_seeds_have_shared_their_images(
    axis: str, key: str, note: str
) -> None:
    assert same_images(recipes_of((axis,), key)) == note


def test_a_run_that_fails_leaves_the_others_as_they_are(
    place: Callable[[str], Path], train: Callable[..., Any], counts: Counter[str]
) -> None:
    alone, together = place("alone"), place("together")
    assert train(alone, "--sweep", "optim.lr=0.05;0.1").code == 0
    counts.clear()
    # The first one, which makes the batches; it is given up in its second epoch.
    words = ("--sweep", "optim.lr=1e30;0.05;0.1", "max_skips=4")
    said = train(together, *words, "--together")
    assert said.code == 1
    assert re.search(r"^optim.lr=1e30 failed: \d+ steps in a row had a loss", said.out, re.M)
    check_same(ends(together), ends(alone))
    assert counts["answers"] == 2 * STEPS


def test_a_full_disk_of_one_run_leaves_the_others_as_they_are(
    place: Callable[[str], Path],
    train: Callable[..., Any],
    rates_alone: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = place("together")
    save, broken = Trainer.save, list[Trainer]()

    def full(self: Trainer) -> None:
        broken.append(self)
        if self is broken[0] and self.progress.position > (0, 2):
            raise RunFailed("no space left on the disk")
        save(self)

    monkeypatch.setattr(Trainer, "save", full)
    said = train(together, *RATES, "--together")
    assert said.code == 1
    assert "optim.lr=0.05 failed: no space left on the disk\n" in said.out
    found, whole = ends(together), rates_alone
    assert len(found) == 2
    check_same(found, {digest: whole[digest] for digest in found})


def test_a_mistake_in_one_run_is_found_before_any_has_begun(
    place: Callable[[str], Path], train: Callable[..., Any]
) -> None:
    folder = place("together")
    words = ("augment.xprime=none", "losses.kd=null", "losses.at.weight=1")
    pairs = "losses.at.pairs={stage1: stage1};{stage9: stage1};{stage2: stage1}"
    said = train(folder, *words, "--sweep", pairs, "--together")
    assert said.code == 2
    assert "unknown tap 'stage9'" in said.err
    assert not (folder / "runs").exists()


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int, number: signal.Signals) -> None:
    """Send the signal within the `call`-th optimizer step of all runs, from 0."""
    calls = [0]
    optimize = Trainer.optimize

    def stopped(self: Trainer, *given: Any) -> None:
        if calls[0] == call:
            os.kill(os.getpid(), number)
        calls[0] += 1
        optimize(self, *given)

    monkeypatch.setattr(Trainer, "optimize", stopped)


@pytest.mark.parametrize(
    "call",
    [
        5 * STEPS + 1,
        *(pytest.param(call, marks=pytest.mark.matrix) for call in (0, 4, 3 * STEPS - 1)),
    ],
)
def test_a_signal_saves_every_run_and_the_same_command_resumes_all(
    place: Callable[[str], Path],
    train: Callable[..., Any],
    rates_alone: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    together = place("together")
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupt_at(patch, call, signal.SIGTERM)
        said = train(together, "save_steps=null", *RATES, "--together")
    assert said.code == 143
    assert said.err == (
        "fastkd: stopped with 3 runs under way, whose state is saved; run the same command again "
        "to resume the whole sweep\n"
    )
    assert signal.getsignal(signal.SIGTERM) is before
    again = train(together, "save_steps=null", *RATES, "--together")
    assert (again.code, again.err) == (0, "")
    assert again.out.count(": resumed tiny/kd ") == 3
    check_same(ends(together), rates_alone)


def test_runs_that_are_behind_catch_up_first(
    place: Callable[[str], Path],
    train: Callable[..., Any],
    rates_alone: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    counts: Counter[str],
) -> None:
    together = place("together")
    # The first run alone, up to the second step of its second epoch.
    with monkeypatch.context() as patch:
        interrupt_at(patch, STEPS + 1, signal.SIGINT)
        assert train(together, *RATES).code == 130
    counts.clear()
    said = train(together, *RATES, "--together")
    assert (said.code, said.err) == (0, "")
    assert "optim.lr=0.05: resumed tiny/kd at epoch 2 of 2, step 2 of 4" in said.out
    assert counts["answers"] == 2 * STEPS
    check_same(ends(together), rates_alone)


def test_the_same_command_again_only_prints(
    place: Callable[[str], Path], train: Callable[..., Any], counts: Counter[str]
) -> None:
    folder = place("together")
    first = train(folder, *RATES, "--together")
    counts.clear()
    again = train(folder, *RATES, "--together")
    assert (again.code, sum(counts.values())) == (0, 0)
    assert again.out.count("finished before") == 3
    assert again.out[again.out.index("\nrun ") :] == first.out[first.out.index("\nrun ") :]


def test_a_run_that_is_left_over_runs_as_ever(
    place: Callable[[str], Path], train: Callable[..., Any]
) -> None:
    folder = place("together")
    assert train(folder, "--sweep", "optim.lr=0.05;0.1").code == 0
    said = train(folder, *RATES, "--together")
    assert said.code == 0
    assert "together" not in said.out
    assert len(ends(folder)) == 3


class InPlace(nn.Module):
    """Its first layer writes into the images."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, 10]."""
        return self.fc(images_NCHW.relu_().mean((2, 3)))


def trained(trainers: list[Trainer]) -> list[dict[str, str]]:
    """The weights after an epoch in turns, by name of the student's tensors."""
    turns = [trainer.training() for trainer in trainers]
    going = list(turns)
    while going:
        for one in list(going):
            if next(one, None) is None:
                going.remove(one)
    return [tiny.digests(trainer.student.state_dict()) for trainer in trainers]


def trainer_of(student: nn.Module, weight: float) -> Trainer:
    torch.manual_seed(0)
    return make_trainer(
        student,
        [KD(weight=weight, ce_weight=0.1)],
        data=data_of(40, 20, batch_size=8),
        settings=TrainingSettings(optim=OptimConfig(), compile="off"),
    )


@pytest.mark.parametrize("writes_first", [True, False])
def test_a_student_that_writes_into_its_images_leaves_those_of_the_others(
    writes_first: bool,
) -> None:
    def both() -> list[Trainer]:
        torch.manual_seed(1)
        made = [trainer_of(InPlace(), 0.9), trainer_of(create_model("resnet8", 10), 0.5)]
        return made if writes_first else made[::-1]

    alone = [digest for one in both() for digest in trained([one])]
    together = both()
    shared = SharedBatches()
    for trainer in together:
        trainer.shared = shared
        trainer.teacher = together[0].teacher  # they have the same weights
    assert trained(together) == alone


def test_trainers_that_need_other_batches_get_their_own(counts: Counter[str]) -> None:
    """Such as one whose step has failed to compile: alone its teacher would run eagerly too."""
    together = [trainer_of(create_model("resnet8", 10), weight) for weight in (0.9, 0.5, 0.1)]
    shared = SharedBatches()
    for trainer in together:
        trainer.shared = shared
        trainer.teacher = together[0].teacher
    together[1].decisions["compile"] = "on"
    trained(together)
    assert counts == {"batches": 2 * 5, "answers": 2 * 5}


def recipes_of(axes: tuple[str, ...], *words: str) -> dict[Choice, Recipe]:
    return {
        choice: load_recipe("quickstart", overrides=[*TINY, *words, *choice])
        for choice in combinations(axes)
    }


def groups_of(axes: tuple[str, ...], *words: str) -> list[str]:
    """The lines that say how a sweep is grouped, without the first one."""
    recipes = recipes_of(axes, *words)
    named = {choice: "+".join(one.partition("=")[2] for one in choice) for choice in recipes}
    world = World(0, 0, 1, torch.device("cpu"), None)
    groups = grouped(recipes, Session(world, Console(enabled=False), Path("runs")))
    return in_words(groups, named)[1:]


ORDER = "images in the order of seed 1: data.seed gives all seeds the same"
TAUGHT = "another training of the teacher: teacher.seed, .lr, .epochs or .weights fix it"
KD_CE = "kd: {weight: 1, ce_weight: 1}"
AT = "at: {weight: 1, pairs: {stage1: stage1}}, ce: {weight: 1}"


@pytest.mark.parametrize(
    ("axes", "words", "lines"),
    [
        # What is up to each student.
        (
            ("optim.lr=0.1;0.2", "student.name=resnet8;vgg8", "ema=null;0.9"),
            ("teacher.weights=t.pt",),
            1,
        ),
        (
            ("save_steps=1;2", "max_skips=1;2", "accumulate=1;2", "eval_epochs=1;2"),
            ("teacher.weights=t.pt",),
            1,
        ),
        (("epochs=1;2",), (), 1),
        (("seed=0;1",), ("data.seed=0", "teacher.seed=0"), 1),
        (
            ("seed=0;1",),
            (),
            ["group 1: 0", f"group 2: 1 ({ORDER}, {TAUGHT})"],
        ),
        (("seed=0;1",), ("teacher.seed=0",), ["group 1: 0", f"group 2: 1 ({ORDER})"]),
        (("optim.lr=0.1;0.2",), ("teacher.lr=null",), ["group 1: 0.1", f"group 2: 0.2 ({TAUGHT})"]),
        (
            ("batch_size=16;32", "augment.padding=1;2"),
            ("teacher.weights=t.pt",),
            [
                "group 1: 16+1",
                "group 2: 16+2 (augment.padding=2)",
                "group 3: 32+1 (batch_size=32)",
                "group 4: 32+2 (batch_size=32)",
            ],
        ),
        (
            ("teacher.name=resnet8;vgg8", "losses.kd.temperature=2;4"),
            ("teacher.width=null",),
            ["group 1: resnet8+2; resnet8+4", "group 2: vgg8+2; vgg8+4 (teacher.name=vgg8)"],
        ),
        (
            (f"losses={{{KD_CE}}};{{{AT}}};{{ce: {{weight: 1}}}}",),
            (),
            [
                f"group 1: {{{KD_CE}}}",
                f"group 2: {{{AT}}} (losses that ask the teacher for x: stage1)",
                "group 3: {ce: {weight: 1}} (losses that ask the teacher for nothing)",
            ],
        ),
        (
            ("data.drop_last=true;false",),
            ("teacher.weights=t.pt",),
            ["group 1: true", "group 2: false (data.drop_last=false)"],
        ),
        (("epochs=1;2",), ("augment.sizes=8",), ["group 1: 1", "group 2: 2 (epochs=2)"]),
        (
            ("augment.pick.pool=2;3", "augment.pick.share=0.5;0.25"),
            ("augment.xprime=cutmix", "losses.kd.views=x,xprime"),
            ["group 1: 2+0.5; 2+0.25", "group 2: 3+0.5; 3+0.25 (augment.pick.pool=3)"],
        ),
        (
            ("student.name=resnet8;timm:resnet18",),
            ("student.width=null",),
            ["group 1: resnet8", "group 2: timm:resnet18 (networks from outside the zoo=true)"],
        ),
    ],
)
def test_a_sweep_says_how_it_is_grouped_and_why(
    axes: tuple[str, ...], words: tuple[str, ...], lines: int | list[str]
) -> None:
    said = groups_of(axes, "teacher.epochs=1", "teacher.lr=0.1", *words)
    if isinstance(lines, int):
        assert len(said) == lines
    else:
        assert [line.strip() for line in said] == lines


def test_a_dry_run_rehearses_every_group_and_writes_nothing(
    place: Callable[[str], Path], train: Callable[..., Any], counts: Counter[str]
) -> None:
    folder = place("together")
    axes = ("--sweep", "student.name=resnet8;resnet14", "--sweep", "augment.padding=1;2")
    said = train(folder, *axes, "--together", "--dry-run")
    assert (said.code, said.err) == (0, "")
    assert "together: 4 runs in 2 groups\n" in said.out
    assert said.out.count("peak memory MiB") == said.out.count("projected duration") == 2
    first, second = said.out.split("dry run of group ")[1:]
    assert "name=resnet8 padding=1: " in first and "name=resnet14 padding=1: " in first
    assert "name=resnet8 padding=2: " in second and "name=resnet14 padding=2: " in second
    # Two steps of each group, after the trials without a loader.
    assert counts == {"batches": 2 * 2, "answers": 2 * 2}
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--together",),
            "--together is for the runs of a --sweep, which it trains in one process",
        ),
        (
            (*RATES, "--together", "--jobs", "2"),
            "--together trains the runs in one process and --jobs 2 each in its own: leave one of "
            "them out",
        ),
    ],
)
def test_what_together_cannot_be_combined_with(
    command: Callable[..., Any], words: tuple[str, ...], sentence: str
) -> None:
    said = command("train", *words)
    assert (said.code, said.out, said.err) == (2, "", f"fastkd: {sentence}\n")


def test_together_is_for_one_process() -> None:
    recipes: dict[Choice, Recipe] = {("a",): load_recipe("quickstart")}
    world = World(0, 0, 2, torch.device("cpu"), "gloo")
    session = Session(world, Console(enabled=False), Path("runs"))
    with pytest.raises(UserError, match="--together trains its runs in one process and does not"):
        run_sweep(recipes, session, together=True)
