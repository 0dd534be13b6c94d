"""`not from the paper`: which keys of a recipe are called so, and whose values they are said to be.

STATED is what our texts of the papers say, read out of them by itself; everything else that a
recipe sets must be labelled, in both modes of a row.
"""

import re

import pytest

from fastkd.recipes.catalogue import all_recipes

# What a row is about: data set, networks and their weights.
ROW = re.compile(
    r"data\.name|(student|teacher)\.(name|block|shortcuts|width|stem|train|pretrained|ensemble"
    r"|weights|new_head|frozen)"
)
SGD = "epochs batch_size optim.lr optim.momentum optim.milestones optim.gamma losses.ce.weight"
ATTENTION = "losses.at.weight losses.at.pairs"
# (paper, data set) -> keys; `*`: every other data set of the paper.
STATED = {
    ("moonshine", "*"): f"{SGD} losses.kd.weight losses.kd.ce_weight "
    f"losses.kd.temperature {ATTENTION}",
    ("moonshine", "imagenet"): f"{SGD} {ATTENTION}",
    ("moonshine", "cityscapes"): f"losses.ce.weight {ATTENTION}",
    # The numbers of section 5 are lost, except these.
    ("demystification", "*"): "epochs batch_size augment.pad_mode optim.schedule student.dropout "
    "teacher.dropout losses.ce.weight",
    ("kdda", "*"): "epochs batch_size data.image_size optim.lr optim.milestones optim.gamma "
    "losses.ce.weight losses.kd.weight losses.kd.ce_weight losses.kd.temperature augment.xprime "
    "augment.pick.criterion augment.pick.temperature augment.pick.share",
    ("meal_v2", "*"): "epochs batch_size data.image_size augment.crop augment.xprime optim.lr "
    "optim.weight_decay optim.milestones optim.gamma losses.soft_ce.view losses.discriminator.view",
    ("transfer", "*"): "epochs batch_size data.image_size augment.crop optim.lr optim.momentum "
    "optim.weight_decay losses.ce.weight losses.bce.weight",
    ("alignkd", "*"): "epochs optim.lr optim.schedule losses.ce.weight losses.kd.weight "
    "losses.kd.ce_weight losses.stage_mse.weight losses.stage_mse.pairs "
    "losses.stage_mse.eta_epochs losses.stage_mse.eta_end losses.jointrd.weight "
    "losses.jointrd.feature_weight losses.jointrd.stages losses.jointrd.eta_epochs "
    "losses.jointrd.eta_end losses.jointrd.form",
}
PAPERS = sorted({paper for paper, _ in STATED})
GONE = object()


def of_paper(paper):
    return {n: e for n, e in all_recipes().items() if n.startswith(f"{paper}/")}


def test_every_remark_is_about_a_key_that_a_recipe_has():
    by_sources = {}
    for entry in all_recipes().values():
        paper = entry.name.split("/")[0]
        by_sources.setdefault(paper, set()).update(entry.sources)
        assert set(entry.silent) <= set(entry.keys)
    for paper, remarks in by_sources.items():
        used = {key for entry in of_paper(paper).values() for key in entry.silent}
        assert remarks == used, paper


@pytest.mark.parametrize("paper", PAPERS)
def test_what_our_text_of_a_paper_lacks_is_labelled(paper):
    free, plain = {}, set()
    for name, entry in of_paper(paper).items():
        dataset = name.split("/")[1]
        stated = set(STATED.get((paper, dataset), STATED[paper, "*"]).split())
        for key in entry.keys:
            if key in entry.silent or ROW.fullmatch(key):
                continue
            plain.add(key)
            if key not in stated:
                free[key] = name
    assert not free
    in_text = {key for (of, _), keys in STATED.items() if of == paper for key in keys.split()}
    assert in_text == plain


def both_modes():
    """(by the text, by the released code) of every row that has both."""
    recipes = all_recipes()
    for entry in recipes.values():
        if entry.row is not None:
            pair = {one.mode: one for one in (entry, recipes[entry.row])}
            yield pair["paper"], pair["released"]


def test_a_value_of_one_mode_is_not_said_to_be_the_other_s():
    rows = 0
    for text, code in both_modes():
        keys = {**text.keys, **code.keys}
        differ = {k for k in keys if text.keys.get(k, GONE) != code.keys.get(k, GONE)}
        assert differ, text.name
        for key in differ & set(text.keys):
            assert "code" not in text.silent.get(key, ""), (text.name, key)
        for key in differ & set(code.keys):
            assert "code" in code.silent.get(key, ""), (code.name, key)
        same = set(keys) - differ
        assert same & set(text.silent) == same & set(code.silent), text.name
        rows += 1
    assert rows == sum(entry.row is not None for entry in all_recipes().values()) > 100


def test_a_remark_on_a_schedule_stands_beside_that_schedule():
    seen = set()
    for name, entry in all_recipes().items():
        if any("OneCycle" in remark for remark in entry.silent.values()):
            assert entry.keys["optim.schedule"] == "onecycle", name
            seen.add(name)
    assert "alignkd/cifar10/resnet18--plain18/jointrd" in seen


@pytest.mark.parametrize(
    ("name", "key", "shown"),
    [
        ("moonshine/cifar10/wrn_40_2--wrn_40_2-G:4/kd:paper", "losses.kd.weight", "0.9"),
        (
            "moonshine/cifar10/wrn_40_2--wrn_40_2-G:4/kd",
            "losses.kd.weight",
            "0.18 not from the paper: the released code: 2 alpha / number of classes, alpha = 0.9",
        ),
        (
            "alignkd/cifar10/resnet18--plain18/jointrd:released",
            "optim.momentum",
            "0.9 not from the paper: JointRD's code",
        ),
        (
            "alignkd/cifar10/resnet18--plain18/jointrd:released",
            "losses.ce.weight",
            "0.25 not from the paper: JointRD's code",
        ),
    ],
)
def test_a_label_as_it_is_shown(command, name, key, shown):
    lines = command("recipes", "show", name).out.splitlines()
    (line,) = [line for line in lines if line.startswith(f"  {key} ")]
    assert line.split()[1:] == shown.split()
