"""A recipe is typed and closed: what its keys mean, what its digest covers."""

import dataclasses
import re

import pytest
import yaml
from pydantic import ValidationError

from fastkd.errors import UserError
from fastkd.recipe.overrides import parse_override
from fastkd.recipe.printing import annotated_yaml, recipe_to_yaml, valid_keys
from fastkd.recipes.loading import find_recipe, load_recipe
from fastkd.training.config import OptimConfig


def quickstart(*overrides, **options):
    return load_recipe("quickstart", overrides=overrides, **options)


def mistake(*overrides, **options):
    with pytest.raises(UserError) as caught:
        quickstart(*overrides, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optim.lr=0.1", 0.1),
        ("optim.lr=1e-3", 1e-3),
        ("epochs=30", 30),
        ("flip=true", True),
        ("optim.milestones=150,180,210", [150, 180, 210]),
        ("optim.milestones=[150, 180]", [150, 180]),
        (
            "losses.at.pairs={stage1: stage2, stage2: stage3}",
            {"stage1": "stage2"} | {"stage2": "stage3"},
        ),
        ("a=x, y", ["x", "y"]),
        ("teacher=null", None),
        ("out=", None),
        ("data.root=a=b", "a=b"),
    ],
)
def test_an_override_is_read_by_the_type_of_its_key(text, value):
    assert parse_override(text) == (text.partition("=")[0], value)


def test_one_value_is_a_list_of_one_and_none_an_empty_one():
    assert quickstart("baseline.lrs=0.3").baseline.lrs == (0.3,)
    assert quickstart("baseline.lrs=").baseline.lrs == ()
    ready = ("teacher.train=false", "teacher.weights=t.pt")
    assert quickstart("teacher.class_map=3", *ready).teacher.class_map == (3,)
    assert quickstart("teacher.class_map=").teacher.class_map is None
    views = quickstart("augment.xprime=mixup", "losses.kd.views=xprime").losses["kd"].views
    assert views == ("xprime",)


def test_text_that_reads_as_a_number_is_one():
    recipe = quickstart("optim.lr=1e-3", "compile=on", "student.width=1")
    assert (recipe.optim.lr, recipe.compile, recipe.student.width) == (1e-3, "on", 1.0)


@pytest.mark.parametrize("text", ["BG:2:M:8", "BG(2,M/8)", "BG(2, M/8)"])
def test_a_block_is_kept_under_its_canonical_name(text):
    recipe = quickstart(f"student.block={text}", "student.shortcuts=projection")
    assert recipe.student.options() == {
        "width": 0.25,
        "block": "BG(2,M/8)",
        "shortcuts": "projection",
    }
    assert quickstart("student.shortcuts=false").student.options()["shortcuts"] is False


def test_overrides_beat_the_file_and_the_file_beats_the_recipe(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 7\nbatch_size: 20\noptim: {lr: 0.3}\n")
    recipe = quickstart("batch_size=10", config=file)
    assert (recipe.epochs, recipe.batch_size, recipe.optim.lr) == (7, 10, 0.3)
    assert recipe.optim.schedule == "cosine"  # of the recipe


def test_a_partial_file_may_name_its_base(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: quickstart\nepochs: 7\n")
    assert load_recipe(None, config=file) == quickstart("epochs=7")
    file.write_text("name: mine\nepochs: 7\n")
    with pytest.raises(UserError, match=r"of a recipe to start from\. there is no recipe 'mine'"):
        load_recipe(None, config=file)
    file.write_text("epochs: 7\n")
    with pytest.raises(UserError, match=r"holds only part of a recipe and names no base: give one"):
        load_recipe(None, config=file)


def test_losses_of_a_file_replace_those_of_its_base(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("losses: {ce: {weight: 1}}\nteacher: null\n")
    assert list(quickstart(config=file).losses) == ["ce"]


@pytest.mark.parametrize(
    "name",
    [
        "quickstart",
        "cifar10/resnet56--resnet20/kd",
        "cifar100/wrn_40_2--wrn_16_2/at",
        "kdda/cifar100/wrn_40_2--wrn_16_2/tlcutmix",
        "moonshine/cifar10/wrn_40_1/scratch",
    ],
)
def test_a_recipe_bears_its_name_and_survives_its_file(name, tmp_path):
    recipe = find_recipe(name)
    assert recipe.name == name
    assert recipe.description
    for number, text in enumerate((recipe_to_yaml(recipe), annotated_yaml(recipe))):
        (tmp_path / f"{number}.yaml").write_text(text)
        again = load_recipe(None, config=tmp_path / f"{number}.yaml")
        assert again == recipe
        assert again.digest() == recipe.digest()


def test_an_entry_of_a_list_is_set_by_its_number():
    first, second, _ = quickstart().optim.milestones
    assert quickstart("optim.milestones.2=0.9").optim.milestones == (first, second, 0.9)
    assert quickstart("optim.milestones.3=0.95").optim.milestones[3:] == (0.95,)
    said = mistake("optim.milestones.9=0.95")
    assert "holds optim.milestones.0, " in said and "optim.milestones.3 would add to it" in said


def test_every_key_says_what_it_means():
    recipe = quickstart("losses.at.weight=1", "losses.at.pairs={stage1: stage1}")
    lines = annotated_yaml(recipe).splitlines()
    keys = [line for line in lines if ":" in line.partition("#")[0] and "- " not in line[:6]]
    silent = [line for line in keys if "  # " not in line]
    sections = [
        "data",
        "augment",
        "student",
        "teacher",
        "optim",
        "report",
        "baseline",
        "kd",
        "at",
        "pairs",
    ]
    assert [line.strip() for line in silent if line.strip()[:-1] not in sections] == [
        "stage1: stage1"
    ]
    assert f"{'epochs: 40':<34}  # Passes over the training images." in lines


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(ValidationError, match="frozen"):
        quickstart().epochs = 3


def test_the_digest_names_the_outcome_and_nothing_else():
    digest = quickstart().digest()
    assert re.fullmatch("[0-9a-f]{16}", digest)
    for same in ("out=x", "description=x", "save_steps=3", "track=wandb", "data.workers=0"):
        assert quickstart(same).digest() == digest
    other = ("seed=1", "epochs=3", "optim.lr=0.3", "losses.kd.temperature=3", "ema=0.9", "name=x")
    assert len({quickstart(key).digest() for key in other} | {digest}) == 1 + len(other)


def flat(recipe):
    values = {}

    def walk(prefix, node):
        for key, value in node.items():
            if isinstance(value, dict):
                walk(f"{prefix}{key}.", value)
            else:
                values[f"{prefix}{key}"] = value

    walk("", recipe.model_dump(mode="json"))
    return values


def differing(one, other):
    ones, others = flat(one), flat(other)
    return {key for key in ones | others if ones.get(key, "-") != others.get(key, "-")}


def test_the_baseline_differs_in_the_loss_and_the_rate_only():
    recipe = quickstart("augment.xprime=cutmix", "losses.kd.views=x,xprime")
    found = differing(recipe, recipe.without_teacher("alone", 0.3))
    gone = {key for key in found if key.startswith(("teacher", "losses"))}
    # x' is part of the loss: the student alone has no term that would look at it.
    assert found - gone == {"name", "description", "optim.lr", "baseline.lrs", "augment.xprime"}


def test_the_teacher_is_trained_by_the_same_recipe():
    recipe = quickstart("teacher.epochs=3", "teacher.lr=0.7", "teacher.width=2")
    lesson = recipe.as_teacher()
    assert lesson.name == "teacher/digits/wrn_16_2"
    assert (lesson.epochs, lesson.optim.lr, lesson.student.name) == (3, 0.7, "wrn_16_2")
    assert (lesson.student.width, lesson.teacher, list(lesson.losses)) == (2, None, ["ce"])
    assert lesson.data == recipe.data


def test_a_teacher_with_weights_is_not_trained():
    assert quickstart().teacher.trains
    assert not quickstart("teacher.weights=teacher.pt").teacher.trains
    assert not quickstart("teacher.train=false", "teacher.pretrained=true").teacher.trains


def test_the_epoch_factor_scales_the_whole_schedule():
    scaled = quickstart(
        "epochs=240", "epoch_factor=0.5", "optim.milestones=150,0.75", "optim.warmup_epochs=4"
    )
    assert scaled.total_epochs == 120
    assert scaled.scaled_optim().milestones == (75, 90)
    assert scaled.scaled_optim().warmup_epochs == 2


def test_a_longer_exponential_decay_ends_where_it_would_have_ended():
    scaled = quickstart("optim.schedule=exponential", "optim.gamma=0.81", "epoch_factor=2")
    assert scaled.scaled_optim().gamma == pytest.approx(0.9)


def test_the_options_of_a_network_are_those_that_are_set():
    student = quickstart("student.shortcuts=false", "student.dropout=0").student
    assert student.options() == {"width": 0.25, "shortcuts": False, "dropout": 0.0}


def test_the_keys_of_the_contract_exist():
    top = "seed epochs epoch_factor batch_size precision compile channels_last out deterministic"
    data = "data.name data.root data.backend"
    nets = "student.name student.weights teacher.name teacher.weights teacher.train teacher.epochs"
    optim = "optim.name optim.lr optim.impl"
    assert set(" ".join([top, data, nets, optim]).split()) <= set(valid_keys())


def test_yaml_of_a_recipe_holds_plain_values_only():
    values = yaml.safe_load(recipe_to_yaml(quickstart("baseline.lrs=0.1,0.2")))
    assert values["baseline"] == {"lrs": [0.1, 0.2]}
    assert values["losses"]["kd"]["views"] == ["x"]
    assert not dataclasses.is_dataclass(values["optim"])
    assert set(values["optim"]) == set(OptimConfig.model_fields)


def test_the_digest_is_of_the_outcome_and_not_of_its_spelling(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cifar = ("data.name=cifar10",)
    one = quickstart(*cifar, "data.root=D").digest()
    for word in ("data.root=D/", "data.root=./D", f"data.root={tmp_path}/D"):
        assert quickstart(*cifar, word).digest() == one
    for word in ("data.download=true", "max_skips=3", "data.workers=2"):
        assert quickstart(*cifar, "data.root=D", word).digest() == one
    for word in ("data.root=E", "seed=1", "data.drop_last=false"):
        assert quickstart(*cifar, "data.root=D", word).digest() != one


@pytest.mark.parametrize("key", ["resolution=64", "class_map=1,0", "mean=0,0,0"])
def test_a_teacher_trained_here_has_no_view_of_its_own(key):
    std = ("teacher.std=1,1,1",) if key.startswith("mean") else ()
    name = key.partition("=")[0]
    assert f"teacher.{name} is for finished weights" in mistake(f"teacher.{key}", *std)


def test_a_milestone_in_the_first_epoch_of_a_teacher_is_no_share_of_its_run():
    words = ("epochs=40", "teacher.epochs=10", "optim.milestones=2,30")
    lesson = quickstart("optim.schedule=multistep", *words).as_teacher()
    assert lesson.scaled_optim().milestones == (0.5, 7.5)


def test_the_schedule_of_a_teacher_follows_its_length():
    recipe = quickstart(
        "optim.schedule=multistep",
        "epochs=40",
        "teacher.epochs=20",
        "optim.warmup_epochs=4",
        "optim.milestones=0.25,30,35",
    )
    lesson = recipe.as_teacher()
    assert lesson.optim.milestones == (0.25, 15, 17.5)
    assert lesson.optim.warmup_epochs == 2
    assert "optim.warmup_epochs=50 does not fit into epochs=40" in mistake("optim.warmup_epochs=50")


@pytest.mark.parametrize("loss", ["fsp", "ab"])
def test_the_order_of_pairs_makes_another_run(loss):
    """FSP compares neighbours, AB weighs the later levels more."""
    one, other = (
        quickstart(f"losses.{loss}.weight=1", f"losses.{loss}.pairs={{{a}: {a}, {b}: {b}}}")
        for a, b in (("stage1", "stage2"), ("stage2", "stage1"))
    )
    assert one.digest() != other.digest()
