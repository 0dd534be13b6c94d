"""Every mistake in a recipe becomes one sentence."""

import re

import pytest

from fastkd.errors import UserError
from fastkd.losses.base.registry import term_names
from fastkd.recipe.schema import Recipe
from fastkd.recipes.loading import load_recipe

TOP = ", ".join([*(key for key in Recipe.model_fields if key != "losses"), "losses"])
LOSSES = ", ".join(term_names())


def mistake(*overrides, **options):
    with pytest.raises(UserError) as caught:
        load_recipe("quickstart", overrides=overrides, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("epoch=3", "unknown key epoch, did you mean epochs?"),
        ("optim.gama=1", "unknown key optim.gama, did you mean optim.gamma?"),
        ("optm.weight_decay=1", "unknown key optm.weight_decay, did you mean optim.weight_decay?"),
        ("lr=1", "unknown key lr, did you mean optim.lr or teacher.lr?"),
        ("temperature=1", "unknown key temperature, did you mean losses.kd.temperature"),
        (
            "losses.kd.temprature=1",
            "unknown key losses.kd.temprature, did you mean losses.kd.temperature?",
        ),
        ("optim.lr.x=1", "unknown key optim.lr.x: optim.lr is a value and has no keys of its own"),
        ("xyzzy=1", f"unknown key xyzzy; the keys are {TOP}"),
        ("xyzzy.a.b=1", f"unknown key xyzzy.a.b; the keys are {TOP}"),
        (
            "baseline.xyzzy=1",
            "unknown key baseline.xyzzy; the keys of baseline are lrs",
        ),
        ("losses.xyzzy.weight=1", f"there is no loss 'xyzzy'. Losses: {LOSSES}"),
        ("losses.xyzzy=null", f"there is no loss 'xyzzy'. Losses: {LOSSES}"),
        (
            "losses.kdd.weight=1",
            "there is no loss 'kdd', did you mean losses.kd? Losses: ",
        ),
        ("=3", "expected key=value, got '=3'"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(override, sentence):
    assert mistake(override).startswith(sentence)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("epochs=three", "epochs=three: expected a whole number above 0"),
        ("epochs=0", "epochs=0: expected a whole number above 0"),
        ("epochs=", "epochs=null: expected a whole number above 0"),
        ("seed=1.5", "seed=1.5: expected a whole number of at least 0"),
        ("optim.lr=fast", "optim.lr=fast: expected a number above 0"),
        ("optim.momentum=1", "optim.momentum=1: expected a number of at least 0 and below 1"),
        ("ema=1", "ema=1: expected a number above 0 and below 1, or null"),
        ("augment.flip=2", "augment.flip=2: expected true or false"),
        (
            "precision=fp33",
            "precision=fp33: expected one of auto, bf16, fp16, fp32; did you mean fp32?",
        ),
        ("compile=maybe", "compile=maybe: expected one of auto, on, off"),
        (
            "data.mean=0.5",
            "data.mean=0.5: expected 3 values joined by commas, each a number of at "
            "least -10000 and at most 10000, or null",
        ),
        (
            "data.std=1,2",
            "data.std=1,2: expected 3 values joined by commas, each a number of at "
            "least 0.0001 and at most 10000, or null",
        ),
        (
            "teacher.class_map=1,x",
            "teacher.class_map=1,x: expected a list joined by commas, each a whole number, or null",
        ),
        ("student={name: 3}", "student.name=3: expected text; in YAML put it in quotes"),
        ("student.block=G(M)", "there is no block 'G(M)'; expected S, S-2x2, G(g), G(N/d), G(N)"),
        ("teacher.block=4", "there is no block '4'; expected S, S-2x2, G(g)"),
        ("student.shortcuts=pat", "student.shortcuts=pat: expected true or false or one of pad"),
        ("baseline=3", "baseline=3: expected keys of its own (lrs), not a value"),
        (
            "losses.ce=3",
            "losses.ce=3: expected keys of its own (weight, label_smoothing, class_weights), not a "
            "value",
        ),
        ("losses.kd.weight=-1", "losses.kd.weight=-1: expected a number above 0"),
        (
            "losses.kd.views=x,y",
            "losses.kd.views=x,y: expected a list joined by commas, each one of x, xprime",
        ),
        ("data.mean=[1,2", "data.mean=[1,2: the value is not valid YAML (line 2, column 1: "),
        ("name=a/../b", "name=a/../b: expected a folder below runs/"),
        ("name=/a", "name=/a: expected a folder below runs/"),
        ("accumulate=3", "batch_size=50 cannot be split into accumulate=3 equal micro-batches"),
        ("losses.kd=null", "a recipe needs at least one loss term, e.g. losses.ce.weight=1"),
        ("teacher=null", "losses.kd needs a teacher: set teacher.name"),
        ("teacher.train=false", "the teacher wrn_16_2 has no weights: set teacher.weights=FILE"),
        (
            "losses.kd.views=x,xprime",
            "losses.kd needs the view x': set augment.xprime=cutmix or another",
        ),
        (
            "augment.xprime=cutmix",
            "augment.xprime=cutmix would make a view x' that no loss uses: set losses.kd.views",
        ),
        ("losses.ce.weight=1", "the losses kd and ce both report a part named 'ce': drop one"),
        (
            "data.root=DIR",
            "data.root=DIR would not be read, data.name=digits needs no folder: say w",
        ),
        ("losses.at.weight=1", "losses.at.pairs is missing and has no default: set it, a mapping"),
    ],
)
def test_a_wrong_value_is_told_what_is_allowed(override, sentence):
    found = mistake(override)
    assert found.startswith(sentence) or re.search(f"(^|\n){re.escape(sentence)}", found)
    assert "\n" not in found


def test_each_of_several_mistakes_has_its_own_sentence():
    assert mistake("epochs=0", "optim.lr=x", "foo.bar=1", "xyzzy=2").splitlines() == [
        "epochs=0: expected a whole number above 0",
        "optim.lr=x: expected a number above 0",
        f"unknown key foo.bar; the keys are {TOP}",
        f"unknown key xyzzy; the keys are {TOP}",
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a: [1\nb: 2\n", "is not valid YAML (line 2, column 2: did not find expected ',' or ']'"),
        (b"\xff\xfe\x00", "is not valid YAML ('utf-8' codec"),
        ("", "must hold keys such as `epochs: 30`, one a line; it holds nothing"),
        ("- 1\n", "must hold keys such as `epochs: 30`, one a line; it holds a list"),
        ("1: 2\n", "unknown key 1; the keys are name, description"),
        ("epoch: 3\n", "unknown key epoch, did you mean epochs?"),
        ("optim:\n  lr: 1\n  lr: 2\n", "(line 3, column 3: the key lr appears twice)"),
    ],
    ids=["syntax", "binary", "empty", "list", "numbers", "unknown key", "twice"],
)
def test_a_broken_file_is_one_sentence(tmp_path, content, sentence):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = mistake(config=file)
    assert sentence in found
    assert "\n" not in found


def test_a_missing_file_and_an_unknown_recipe_are_named(tmp_path):
    assert mistake(config=tmp_path / "no.yaml").endswith("no.yaml: No such file or directory")
    with pytest.raises(UserError, match=r"no recipe 'quikstart'\. Nearest: quickstart\."):
        load_recipe("quikstart")


@pytest.mark.parametrize("name", ["transfer/cifar10/resnet50-meal_v2/linear", "cifar10/resnet20"])
def test_the_keys_of_a_teacher_need_one(name):
    with pytest.raises(UserError) as caught:
        load_recipe(name, overrides=["teacher.epochs=1", "teacher.lr=0.1"])
    assert str(caught.value).startswith(f"teacher.epochs, teacher.lr: {name} has no teacher; ")
    named = ["teacher.name=resnet20", "teacher.train=true", "losses.kd.weight=1"]
    with_one = load_recipe(name, overrides=[*named, "losses.kd.ce_weight=0", "teacher.epochs=1"])
    assert with_one.teacher.epochs == 1


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "augment.xprime=cutmix losses.kd.views=xprime",
            "augment.xprime=cutmix is for labels of whole images",
        ),
        (
            "augment.xprime=cropflip augment.flip=true losses.kd.views=xprime",
            "augment.xprime=cropflip is for labels of whole images",
        ),
        ("augment.mixup=0.2", "augment.mixup=0.2 is for labels of whole images"),
        ("augment.cutmix=1", "augment.cutmix=1.0 is for labels of whole images"),
        ("augment.sizes=8,16", "augment.sizes=8,16 is for labels of whole images"),
        ("augment.crop=resized", "augment.crop=resized squeezes areas"),
        ("augment.policy=trivial", "augment.policy=trivial shears"),
        (
            "teacher.resolution=32 teacher.train=false teacher.weights=t.pt",
            "teacher.resolution shows a teacher squares",
        ),
        ("data.backend=dali", "data.backend=dali decodes images without their label maps"),
    ],
)
def test_what_does_not_go_with_label_maps_is_said_before_a_run(override, sentence):
    assert sentence in mistake("data.name=camvid", "data.root=x", *override.split())


@pytest.mark.parametrize("key", ["augment.scale=0.5,2", "augment.window=8,8"])
def test_what_is_for_label_maps_only(key):
    name = key.partition("=")[0]
    assert f"{name} is for sets with label maps" in mistake(key)
