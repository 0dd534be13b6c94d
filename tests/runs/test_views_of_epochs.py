"""Which images a run sees, and in which epoch: `data.seed` and `augment.cycle`.

The runs have everything that is random about images: three recipes, since not all of it goes
together.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd.data.sources.synthetic
from fastkd.compute.ranks import World
from fastkd.data import open_data
from fastkd.data.loaders.plan import BatchPlan
from fastkd.losses.base.schedules import scheduled_values
from fastkd.models import create_model
from fastkd.output.console import Console
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session, build_stage, open_recipe_data
from fastkd.storage.weights import describe, save_weights
from fastkd.teachers.loading import load_teacher
from fastkd.testing.recipes import TINY
from fastkd.training.trainer import Trainer

SMALL = (
    *TINY,
    "baseline.lrs=",
    "data.image_size=8",
    "data.drop_last=false",
    "data.train_limit=40",
    "batch_size=16",
    "student.name=resnet8",
    "teacher.train=false",
    "teacher.epochs=null",
    "teacher.lr=null",
    "teacher.name=resnet8",
    "teacher.width=0.5",
    "teacher.weights=teacher.safetensors",
    "teacher.min_accuracy=0",
)
TAUGHT = ("teacher.weights=null", "teacher.train=true")
PICKED = ("losses.kd.views=x,xprime", "losses.mixed_ce.weight=1", "augment.pick.images=16")
KINDS = {
    "pools of cutmix": (*PICKED, "augment.xprime=cutmix"),
    "second views": (*PICKED, "augment.xprime=randaugment", "augment.policy=3augment"),
    "mixed x": (
        "augment.policy=trivial",
        "augment.erasing=0.5",
        "augment.repeats=3",
        "augment.mixup=0.3",
        "augment.cutmix=1",
        "augment.mix_share=0.8",
    ),
}
Shown = list[dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _few_validation_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 20)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """The trainer of the student of a recipe in these words."""
    monkeypatch.chdir(tmp_path)
    teacher = create_model("resnet8", 10, width=0.5)
    save_weights(tmp_path / "teacher.safetensors", teacher, describe(teacher))
    world = World(0, 0, 1, torch.device("cpu"), None)
    session = Session(world, Console(enabled=False), tmp_path / "runs")

    def trainer(*words: str) -> Trainer:
        recipe = load_recipe("quickstart", overrides=[*SMALL, *words])
        data = open_recipe_data(recipe, session)
        return build_stage(recipe, data, load_teacher(recipe.teacher, data), session)

    return trainer


def shown(trainer: Trainer, epoch: int) -> Shown:
    """All that the student learns from in an epoch, by step."""
    return [
        {"ids": one.batch.index_N, "labels": one.batch.labels_N} | one.views | one.targets
        for one in trainer.prepare(epoch)
    ]


def same(one: Shown, other: Shown) -> bool:
    """Bit by bit."""
    assert [step.keys() for step in one] == [step.keys() for step in other]
    return all(
        torch.equal(value, there[name])
        for here, there in zip(one, other, strict=True)
        for name, value in here.items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_runs_with_one_seed_of_the_data_see_the_same_and_start_apart(
    make: Callable[..., Trainer], kind: str
) -> None:
    words = KINDS[kind]
    one, other, alone = (
        make(*words, "seed=1", "data.seed=5"),
        make(*words, "seed=2", "data.seed=5"),
        make(*words, "seed=5"),
    )
    for epoch in range(2):
        views = shown(one, epoch)
        assert same(views, shown(other, epoch))
        # The streams are those that a recipe's own seed has.
        assert same(views, shown(alone, epoch))
        assert not same(views, shown(make(*words, "seed=1"), epoch))
    weights = [trainer.student.state_dict()["conv1.weight"] for trainer in (one, other, alone)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    as_ever = make(*words, "seed=1").student.state_dict()["conv1.weight"]
    assert torch.equal(weights[0], as_ever)


def test_dropout_follows_the_seed_of_the_run(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        "fastkd.training.update.step_seed", lambda seed, *_: asked.append(seed) or seed
    )
    make("seed=1", "data.seed=5").fit()
    assert asked == [1] * 3


def recipe(*words: str) -> Recipe:
    return load_recipe(
        "quickstart", overrides=[*SMALL, "teacher.weights=null", "teacher.train=true", *words]
    )


def test_the_student_alone_sees_the_images_of_the_run_that_it_is_compared_with() -> None:
    assert recipe("seed=1", "data.seed=5").without_teacher("alone").data_seed == 5


@pytest.fixture
def first_ids(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The ids of the first epoch of every training, by its name, as they come."""
    ids: dict[str, list[int]] = {}
    prepare = Trainer.prepare

    def noting(self: Trainer, epoch: int) -> Iterator[Any]:
        for one in prepare(self, epoch):
            if epoch == 0:
                ids.setdefault(self.plan.stage, []).extend(one.batch.index_N.tolist())
            yield one

    monkeypatch.setattr(Trainer, "prepare", noting)
    return ids


def test_a_teacher_is_shown_the_images_as_the_data_s_seed_says(
    command: Callable[..., Any],
    first_ids: dict[str, list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So runs of several seeds still share one by teacher.seed, and its images are opened once."""
    opened: list[int] = []

    def noting(*args: Any, seed: int, **more: Any) -> Any:
        opened.append(seed)
        return open_data(*args, seed=seed, **more)

    monkeypatch.setattr("fastkd.runs.one_stage.open_data", noting)
    teacher = ("teacher.weights=null", "teacher.train=true", "teacher.seed=7")
    for seed in (1, 2):
        assert (
            command("train", "quickstart", *SMALL, *teacher, "data.seed=5", f"seed={seed}").code
            == 0
        )
    plan = BatchPlan("synthetic", 40, 16, 5, train=True, drop_last=False)
    # Of the teacher once, of the student in both runs.
    order = plan.order(0).tolist()
    assert first_ids == {
        "teacher/synthetic/resnet8": order,
        "quickstart": order * 2,
    }
    assert opened == [5, 5]
    assert len(list((tmp_path / "runs/teachers").iterdir())) == 1
    taught = {
        words: recipe("teacher.seed=7", *words).as_teacher().digest()
        for words in (("data.seed=5", "seed=1"), ("data.seed=5", "seed=2"), ("data.seed=6",), ())
    }
    assert len(set(taught.values())) == 3


def test_a_seed_of_the_data_is_another_outcome_and_none_is_the_old_one() -> None:
    assert recipe("data.seed=null").digest() == recipe().digest()
    assert len({recipe(f"data.seed={seed}").digest() for seed in ("null", 0, 1)}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_views_and_answers_come_again_after_a_cycle(
    make: Callable[..., Trainer], kind: str
) -> None:
    words = (*KINDS[kind], "epochs=5")
    cycled, plain = make(*words, "augment.cycle=2"), make(*words)
    first = [shown(plain, epoch) for epoch in range(3)]
    assert not same(first[0], first[1]) and not same(first[0], first[2])
    for epoch in range(5):
        assert same(shown(cycled, epoch), first[epoch % 2])


def test_rates_schedules_and_dropout_go_on_through_cycles(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    dropout: list[tuple[int, int]] = []
    schedules: list[float] = []

    def seed(_: int, epoch: int, step: int, rank: int) -> int:
        dropout.append((epoch, step))
        return rank

    def values(terms: Any, epoch: float, device: Any) -> Any:
        schedules.append(epoch)
        return scheduled_values(terms, epoch, device)

    monkeypatch.setattr("fastkd.training.update.step_seed", seed)
    monkeypatch.setattr("fastkd.training.update.scheduled_values", values)
    words = ("epochs=4", "optim.schedule=cosine", "optim.warmup_epochs=0")
    cycled = make(*words, "augment.cycle=1")
    cycled.fit()
    assert dropout == [(epoch, step) for epoch in range(4) for step in range(3)]
    assert schedules == pytest.approx([epoch + step / 3 for epoch, step in dropout])
    # The rate of the last step of each epoch.
    rates = [0.5 * (1 + math.cos(math.pi * (3 * epoch + 2) / 12)) for epoch in range(4)]
    base = recipe().optim.lr
    assert [row["lr"] / base for row in cycled.history] == pytest.approx(rates)


def test_a_cycle_counts_only_where_views_come_again() -> None:
    words = ("epochs=10", "epoch_factor=0.5")
    plain = recipe(*words).digest()
    found = {cycle: recipe(*words, f"augment.cycle={cycle}").digest() for cycle in (1, 4, 5, 6, 30)}
    assert plain == found[5] == found[6] == found[30]
    assert len({plain, found[1], found[4]}) == 3


def test_the_student_alone_keeps_the_cycle_and_its_teacher_is_trained_without() -> None:
    cycled, plain = recipe("epochs=9", "augment.cycle=2"), recipe("epochs=9")
    assert cycled.without_teacher("alone").augment.cycle == 2
    assert cycled.as_teacher().digest() == plain.as_teacher().digest()
