"""The recipe for images of one's own, and what a recipe leaves behind under another network."""

import numpy as np
import pytest
from PIL import Image

from fastkd.errors import UserError
from fastkd.recipe.printing import annotated_yaml
from fastkd.recipes.loading import find_recipe, load_recipe


def load(*overrides, name="folder"):
    return load_recipe(name, overrides=overrides)


@pytest.mark.parametrize(
    ("overrides", "name", "lr", "decay", "warmup"),
    [
        ([], "adamw", 1e-3, 0.05, 5),
        (["student.name=timm:vit_tiny_patch16_224"], "adamw", 1e-3, 0.05, 5),
        (["student.name=torchvision:mobilenet_v3_small", "epochs=20"], "adamw", 1e-3, 0.05, 2),
        (["student.name=shufflenetv2"], "adamw", 1e-3, 0.05, 5),
        (["student.name=timm:resnet18"], "sgd", 0.05, 5e-4, 5),
        (["student.name=wrn_16_2", "epochs=3"], "sgd", 0.05, 5e-4, 0.3),
        (["student.name=torchvision:vgg11_bn"], "sgd", 0.05, 5e-4, 5),
        (["student.name=timm:resnet18", "student.pretrained=true"], "sgd", 0.005, 5e-4, 5),
        (["student.weights=w.pt"], "adamw", 1e-4, 0.05, 5),
        (["optim.name=sgd"], "sgd", 0.05, 5e-4, 5),
        (["optim.lr=0.3"], "adamw", 0.3, 0.05, 5),
        (["student.name=resnet18", "optim={name: adamw, lr: 0.01}"], "adamw", 0.01, 5e-4, 0),
    ],
)
def test_the_optimizer_follows_from_the_student(overrides, name, lr, decay, warmup):
    found = load(*overrides).optim
    assert (found.name, found.lr, found.weight_decay) == (name, pytest.approx(lr), decay)
    assert found.warmup_epochs == pytest.approx(warmup)
    assert found.schedule == ("cosine" if decay != 5e-4 or warmup else "multistep")


def test_a_teacher_is_given_trained_or_left_out():
    assert load().teacher.trains and load().teacher.lr == 1e-3
    given = load("teacher.name=timm:resnet50", "teacher.weights=t.pth", "student.name=resnet20")
    assert not given.teacher.trains and given.optim.name == "sgd"
    tuned = load("teacher.pretrained=true", "teacher.new_head=true")
    assert tuned.teacher.trains and tuned.teacher.lr == pytest.approx(1e-4)
    alone = load("teacher=null", "losses.kd=null", "losses.ce.weight=1")
    assert alone.teacher is None and list(alone.losses) == ["ce"]
    with pytest.raises(UserError, match=r"the labels alone: losses\.kd=null losses\.ce\.weight=1$"):
        load("teacher=null")


def test_what_follows_is_printed_and_saved(tmp_path):
    recipe = load("student.name=timm:resnet18", "epochs=10")
    text = annotated_yaml(recipe)
    assert "  lr: 0.05 " in text and "  warmup_epochs: 1.0 " in text
    (tmp_path / "a.yaml").write_text(text)
    assert load_recipe(None, config=tmp_path / "a.yaml") == recipe
    # A file that names the recipe varies it likewise.
    (tmp_path / "b.yaml").write_text("name: folder\nepochs: 10\nstudent: {name: timm:resnet18}\n")
    assert load_recipe(None, config=tmp_path / "b.yaml") == recipe


def test_nothing_of_the_digits_is_left():
    keys = find_recipe("folder").dotted()
    assert (keys["data.name"], keys["student.width"], keys["teacher.width"]) == (
        "folder",
        None,
        None,
    )
    assert keys["baseline.lrs"] == []


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        (
            "quickstart",
            ["student.name=timm:mobilenetv3_small_050"],
            "student.width=0.25 comes from the recipe quickstart, and timm:mobilenetv3_small_050 "
            "does not take it: set student.width=null",
        ),
        ("quickstart", ["student.name=vgg8"], "student.width=0.25 comes from the recipe quickst"),
        (
            "demystification/cifar100/resnet18-R-G8/scratch",
            ["student.name=torchvision:vit_b_16", "student.width=null"],
            "student.block=G(N/8) comes from the recipe demystification/cifar100/resnet18-R-G8/scr",
        ),
        (
            "moonshine/imagenet/resnet34--resnet34-G:4/at",
            ["data.name=digits", "student.name=shufflenetv1"],
            "student.block=G(4), student.stem=imagenet come from the recipe moonshine/im",
        ),
    ],
)
def test_an_option_of_the_recipe_that_another_network_refuses_is_named(name, overrides, sentence):
    with pytest.raises(UserError) as caught:
        load(*overrides, name=name)
    assert str(caught.value).startswith(sentence)
    # The advice works.
    remedy = str(caught.value).partition(": set ")[2].split()
    load(*overrides, *remedy, name=name)


def test_an_option_that_the_user_gave_is_the_users(tmp_path):
    assert load("student.name=vgg8", "student.width=0.5", name="quickstart").student.width == 0.5
    assert load("student.name=resnet20", name="quickstart").student.width == 0.25


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos") / "set #2, new"
    noise = np.random.default_rng(0)
    for split, number in (("train", 12), ("val", 4)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for n in range(number):
                pixels = noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                pixels[..., label] //= 4
                Image.fromarray(pixels).save(root / split / name / f"{n}.png")
    return root


def test_it_runs_on_a_folder_with_any_characters(command, photos, tmp_path):
    words = ["data.image_size=32", "batch_size=8", "compile=off", "device=cpu", "epochs=2"]
    words += ["student.name=timm:test_efficientnet", "teacher.name=resnet8", "data.workers=0"]
    words += ["teacher.min_accuracy=0", "baseline.lrs=0.01", "out=run #1, [a] :car:"]
    said = command("train", "folder", f"data.root={photos}", *words)
    assert said.code == 0, said.err
    assert (
        "1 more run of the student alone, 2 epochs each (lr 0.01): baseline.lrs= leaves th"
        in said.out
    )
    assert "run folder run #1, [a] :car:\n" in said.out
    assert (tmp_path / "run #1, [a] :car:/best.safetensors").exists()
