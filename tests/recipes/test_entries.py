"""The named recipes: names, keys, settings of the papers, and what is not from the papers."""

import math
import re
from dataclasses import replace

import pytest
from pydantic import ValidationError

from fastkd.errors import UserError
from fastkd.losses.base.registry import build_terms
from fastkd.models.registry import model_options
from fastkd.recipe.schema import Recipe
from fastkd.recipes.catalogue import all_recipes, find_entry
from fastkd.recipes.entry import Entry
from fastkd.recipes.loading import build, find_recipe, load_recipe
from fastkd.recipes.missing import missing
from fastkd.report.paper import paper_row
from fastkd.training.schedules import Schedule

PAPERS = ("moonshine", "demystification", "kdda", "meal_v2", "alignkd")
PART = r"[A-Za-z0-9][\w.:@+\-]*"


def keys_of(name):
    return find_entry(name).keys


def without_name(recipe):
    return recipe.model_dump(exclude={"name", "description"})


def test_names_have_the_parts_that_the_listing_counts_by():
    for name in all_recipes():
        if name in ("quickstart", "folder", "pairs"):
            continue
        of_papers = (*PAPERS, "transfer", "rsb", "vanillakd", "funmatch")
        parts = 4 if name.startswith(of_papers) else 2 + ("--" in name)
        assert re.fullmatch("/".join([PART] * parts), name), name


def test_every_runnable_recipe_is_valid():
    built = {name: build(entry) for name, entry in all_recipes().items() if not missing(entry)}
    assert len(built) > 100
    assert all(recipe.name == name and recipe.description for name, recipe in built.items())


def test_rows_of_the_papers_keep_the_partial_batch():
    for name, entry in all_recipes().items():
        if name.startswith(("moonshine/cifar", *PAPERS[1:])):
            assert entry.keys["data.drop_last"] is False, name


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("cifar100/resnet56--resnet20/kd", (0.2675, 0.2565, 0.2761)),
        ("kdda/cifar100/resnet56--resnet20/kd", (0.2675, 0.2565, 0.2761)),
        ("moonshine/cifar100/wrn_40_2/scratch", (0.2009, 0.1984, 0.2023)),
        ("moonshine/cifar10/wrn_40_2/scratch", (0.2023, 0.1994, 0.2010)),
    ],
)
def test_each_setting_has_its_own_normalisation(name, std):
    assert find_recipe(name).data.std == std


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("demystification/cifar100/resnet18-R-G8/scratch", "optim.warmup_epochs", 0, "one epoch"),
        ("demystification/cifar100/mobilenetv2-R-G8--NR-g8/kd", "optim.warmup_epochs", 0, "one ep"),
        ("alignkd/cifar10/resnet18--plain18/alignkd", "optim.nesterov", False, "JointRD have it"),
        ("alignkd/cifar10/plain18/scratch", "optim.nesterov", False, "JointRD have it"),
        ("kdda/imagenet/resnet34--resnet18/kd", "data.mean", [0.485, 0.456, 0.406], "torchvision"),
    ],
)
def test_what_the_cited_code_does_otherwise_is_said(name, key, value, said):
    """A row that takes its rates from a code and not its warm-up names both."""
    entry = find_entry(name)
    assert entry.keys[key] == value
    assert said in entry.silent[key]


# The schedule section of the oracle of the data augmentation paper.
KDDA_SCHEDULES = [
    ("kdda/cifar100/wrn_40_2--wrn_16_2/kd", 240, (150, 180, 210), 0.05),
    ("kdda/cifar100/wrn_40_2--wrn_16_2/kd@960", 960, (600, 720, 840), 0.05),
    ("kdda/tiny_imagenet/wrn_40_2--wrn_16_2/kd@480", 480, (300, 360, 420), 0.05),
    ("kdda/imagenet/resnet34--resnet18/kd", 100, (30, 60, 90), 0.1),
    ("kdda/imagenet/resnet34--resnet18/kd@200", 200, (60, 120, 180), 0.1),
    ("moonshine/cifar10/wrn_40_2--wrn_16_2/kd", 200, (60, 120, 160), 0.1),
]
RATES = {1: 0.05, 150: 0.05, 151: 0.005, 180: 0.005, 181: 5e-4, 210: 5e-4, 211: 5e-5, 240: 5e-5}


def schedule_of(keys, steps_per_epoch=1):
    """What `build_trainer` makes of the keys, in a recipe that any network can run."""
    optim = {key: value for key, value in keys.items() if key.startswith("optim.")}
    plain = {"data.name": "synthetic", "student.name": "resnet8", "losses.ce.weight": 1.0}
    entry = Entry(name="plain", description="", keys=plain | optim | {"epochs": keys["epochs"]})
    recipe = build(entry)
    return recipe.optim.lr, Schedule.from_config(
        recipe.scaled_optim(), epochs=recipe.total_epochs, steps_per_epoch=steps_per_epoch
    )


@pytest.mark.parametrize(("name", "epochs", "milestones", "lr"), KDDA_SCHEDULES)
def test_schedules_are_those_of_the_papers(name, epochs, milestones, lr):
    rate, schedule = schedule_of(keys_of(name))
    assert (rate, schedule.epochs) == (lr, epochs)
    drops = [e for e in range(1, epochs) if schedule.lr_factor(e) < schedule.lr_factor(e - 1)]
    assert tuple(drops) == milestones  # step e is the first of epoch e + 1


def test_the_rate_of_every_epoch_is_that_of_the_oracle():
    rate, schedule = schedule_of(keys_of("kdda/cifar100/resnet56--resnet20/kd"), 3)
    found = {epoch: rate * schedule.lr_factor(3 * (epoch - 1)) for epoch in RATES}
    assert found == pytest.approx(RATES, rel=1e-12)


def test_alignkd_peaks_where_its_eta_ends():
    rate, schedule = schedule_of(keys_of("alignkd/cifar10/resnet18--plain18/alignkd"), 10)
    factors = [schedule.lr_factor(step) for step in range(2000)]
    assert rate * max(factors) == pytest.approx(0.1)
    assert factors.index(max(factors)) // 10 in (59, 60)
    assert rate * factors[0] == pytest.approx(0.004)


@pytest.mark.parametrize(
    ("name", "on_the_divergence"),
    [
        ("moonshine/cifar10/wrn_40_2--wrn_16_2/kd", 2.88),
        ("moonshine/cifar100/wrn_40_2--wrn_16_2/kd", 0.288),
        ("moonshine/cifar100/wrn_40_2--wrn_16_2/kd:paper", 14.4),
        ("kdda/cifar100/wrn_40_2--wrn_16_2/kd", 14.4),
        ("kdda/cifar100/wrn_40_2--wrn_16_2/crd+kd", 16.0),
        ("alignkd/cifar10/resnet18--plain18/kd", 0.5),
    ],
)
def test_the_weight_of_the_divergence_is_that_of_the_formula(name, on_the_divergence):
    keys = keys_of(name)
    found = keys["losses.kd.weight"] * keys["losses.kd.temperature"] ** 2
    assert found == pytest.approx(on_the_divergence)


def test_attention_has_the_same_share_whatever_the_number_of_layers():
    for name, weight in (
        ("moonshine/cifar10/wrn_40_2--wrn_40_2-G:N:8/at", 1000),
        ("moonshine/imagenet/resnet34--resnet34-G:4/at", 750),
        ("moonshine/cityscapes/erfnet--erfnet-G:N/at", 600),
    ):
        keys = keys_of(name)
        assert keys["losses.at.weight"] == weight
        assert weight * len(keys["losses.at.pairs"]) == 3000


def test_the_encoder_of_erfnet_has_the_attention_of_its_three_layers():
    name = "moonshine/cityscapes/erfnet--erfnet-G:N/at"
    keys = {key: value for key, value in keys_of(name).items() if "class_weights" not in key}
    recipe = build(Entry(name=name, description="", keys=keys))
    first = recipe.of_encoder()
    assert first.losses["at"].weight == 1000
    assert dict(first.losses["at"].pairs) == {f"stage{n}": f"stage{n}" for n in (1, 2, 3)}
    assert (first.data.label_stride, first.epochs, recipe.epochs) == (8, 150, 150)
    lesson = recipe.as_teacher()
    assert lesson.of_encoder().student.name == "erfnet_encoder"
    alone = keys_of("moonshine/cityscapes/erfnet/scratch")
    assert {key: alone[key] for key in ("epochs", "optim.lr", "encoder.label_stride")} == {
        key: keys[key] for key in ("epochs", "optim.lr", "encoder.label_stride")
    }


def test_the_weights_of_erfnet_s_classes_are_of_one_survey_of_pixels():
    """Its two lists differ in the constant, 1.2 and 1.1, and else in how the labels are resized."""
    keys = keys_of("moonshine/cityscapes/erfnet/scratch:released")
    shares = [
        [math.exp(1 / weight) - constant for weight in keys[key]]
        for key, constant in (("encoder.class_weights", 1.2), ("losses.ce.class_weights", 1.1))
    ]
    assert [len(one) for one in shares] == [19, 19]
    assert shares[0] == pytest.approx(shares[1], abs=2e-3)
    assert sum(shares[0]) == pytest.approx(0.88, abs=0.01)
    assert min(min(one) for one in shares) > 0


def test_a_teacher_is_trained_once_for_all_students_and_methods():
    names = ("vgg13--vgg8/kd", "vgg13--mobilenetv2_half/kd@960", "vgg13--vgg8/tlcutmix")
    lessons = [build(find_entry(f"kdda/cifar100/{name}")).as_teacher() for name in names]
    assert len({lesson.digest() for lesson in lessons}) == 1
    alone = build(find_entry("kdda/cifar100/vgg13/scratch"))
    assert without_name(alone) == without_name(lessons[0])


def test_blocks_and_shortcuts_of_demystification():
    keys = keys_of("demystification/cifar100/wrn_22_10-R-G1--NR-g16/kd")
    options = {key: value for key, value in keys.items() if re.match("(teacher|student)", key)}
    assert options == {
        "student.name": "wrn_22_10",
        "student.block": "G(16)",
        "student.shortcuts": False,
        "student.dropout": 0.3,
        "teacher.name": "wrn_22_10",
        "teacher.block": "G(N)",
        "teacher.dropout": 0.3,
        "teacher.train": True,
    }
    assert keys_of("demystification/cifar100/resnet18-R-G8/scratch")["student.block"] == "G(N/8)"


def test_pick_differs_between_text_and_code_in_the_partial_batch_only():
    name = "kdda/cifar100/wrn_40_2--wrn_16_2/tlcutmix-pick"
    text, code = dict(keys_of(name)), dict(keys_of(f"{name}:released"))
    assert (text.pop("augment.pick.share"), code.pop("augment.pick.images")) == (0.5, 64)
    assert text == code


def test_hard_label_cutmix_is_read_in_two_ways():
    name = "kdda/cifar100/vgg13--vgg8/cutmix"
    text, code = build(find_entry(name)), build(find_entry(f"{name}:released"))
    assert (text.augment.xprime, code.augment.xprime) == ("cutmix", "cutmix")
    needs = [[need for term in build_terms(r.losses) for need in term.needs] for r in (text, code)]
    assert "xprime/mixed/labels" in needs[0] and "xprime/teacher/logits" in needs[0]
    assert "xprime/mixed/logits" in needs[1] and "xprime/teacher/logits" not in needs[1]
    weights = [
        {k: v for t in build_terms(r.losses) for k, v in t.weights.items()} for r in (text, code)
    ]
    assert weights[0] == weights[1] | {"mixed_ce": 0.9}
    assert weights[1] == {"ce": 0.1, "kd": 0.9, "kd_xprime": 0.9}


def test_rows_of_the_data_augmentation_paper_lack_no_view_and_no_loss():
    lacks = {n for name, e in all_recipes().items() if name.startswith("kdda/") for n in missing(e)}
    assert not lacks
    cutout = find_entry("kdda/cifar100/vgg13--vgg8/cutout")
    assert build(cutout).augment.xprime == "cutout"
    assert "augment.xprime" in cutout.silent
    assert "augment.xprime" not in find_entry("kdda/cifar100/vgg13--vgg8/tlcutmix").silent


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("kdda/cifar100/wrn_40_2--wrn_16_2/kd:paper", "kdda/cifar100/wrn_40_2--wrn_16_2/kd"),
        (
            "moonshine/cifar10/wrn_40_2--wrn_16_2/kd:released",
            "moonshine/cifar10/wrn_40_2--wrn_16_2/kd",
        ),
        (
            "moonshine/cifar10/wrn_40_2--wrn_16_2/kd:paper",
            "moonshine/cifar10/wrn_40_2--wrn_16_2/kd:paper",
        ),
    ],
)
def test_a_mode_may_be_named(name, found):
    assert find_entry(name).name == found


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("kdda/cifar100/wrn40_2--wrn16_2/tlcutmix", "kdda/cifar100/wrn_40_2--wrn_16_2/tlcutmix"),
        ("cifar10/resnet56-resnet20/kd", "cifar10/resnet56--resnet20/kd"),
        ("cifar100/wrn_16_2:released", "cifar100/wrn_16_2"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(name, nearest):
    with pytest.raises(UserError, match=re.escape(f"no recipe {name!r}. Nearest: ")) as caught:
        find_recipe(name)
    assert nearest in re.split(r"[ ,.]+(?= |$)|, | ", str(caught.value))


def entry_of(**keys):
    plain = {"data.name": "synthetic", "student.name": "resnet8", "losses.ce.weight": 1.0}
    changed = {key.replace("__", "."): value for key, value in keys.items()}
    return Entry(name="plain", description="", keys=plain | changed)


def test_what_is_missing_is_found_by_asking():
    assert missing(entry_of()) == ()
    assert missing(
        entry_of(
            data__name="holograms",
            augment__bend__angle=3,
            student__width=0.5,
            student__block="G(4)",
            teacher__name="resnet7",
            teacher__train=True,
            losses__nothing__weight=1.0,
            losses__ce__colour="red",
            optim__schedule="zigzag",
        )
    ) == (
        "data.name=holograms",
        "augment.bend",
        "optim.schedule=zigzag",
        "losses.ce.colour",
        "losses.nothing",
        *(() if "block" in (model_options("resnet8") or ()) else ("student.block of resnet8",)),
        "teacher.name=resnet7",
    )
    assert missing(entry_of(student__name="timm:resnet18.a1_in1k")) == ()
    assert missing(entry_of(student__name="timm:resnet18.no_such_tag")) == (
        "student.name=timm:resnet18.no_such_tag",
    )


def test_a_value_out_of_range_is_no_gap_but_a_mistake():
    with pytest.raises(ValidationError, match="greater than 0"):
        missing(entry_of(optim__lr=-1.0))


def test_a_recipe_that_needs_more_than_there_is_says_so(monkeypatch):
    entry = entry_of(losses__nothing__weight=1.0)
    monkeypatch.setattr("fastkd.recipes.catalogue.all_recipes", lambda: {"plain": entry})
    with pytest.raises(UserError, match=r"the recipe plain needs something .*: losses\.nothing\."):
        load_recipe("plain")


ROW = "kdda/cifar100/resnet56--resnet20/kd"
SUMMARY = {"accuracy_last": 0.7031, "accuracy_best": 0.7062}


def beside_paper(recipe, summary):
    return paper_row(recipe.name, recipe.dotted(), summary)


def test_a_run_of_a_row_is_set_beside_the_paper():
    free = ("data.root=x", "seed=3", "precision=fp32", "teacher.weights=t.pt", "baseline.lrs=0.1")
    found = beside_paper(load_recipe(ROW, overrides=free), SUMMARY)
    assert found.row == {"run": "paper, Table 1", "accuracy_last": 0.7066, "note": "+- 0.24"}
    assert found.text.startswith(
        "the paper's top-1 accuracy 70.66 +- 0.24 (Table 1); here 70.31 in the last epoch, -0.35 "
        "points; the paper does not say which epoch it used. 7 keys are not from the paper: fastkd"
    )
    assert found.facts["changed"] == []


def test_a_run_with_other_keys_is_not():
    found = beside_paper(load_recipe(ROW, overrides=["epochs=30", "losses.kd.weight=1"]), SUMMARY)
    assert found.row is None
    assert found.text == (
        "not comparable with the paper's top-1 accuracy 70.66 +- 0.24 (Table 1): epochs=30 (there "
        "240), losses.kd.weight=1.0 (there 0.9)"
    )


def test_weights_that_a_row_starts_from_may_lie_anywhere():
    row = "transfer/cub200/resnet50-meal_v2/linear"
    free = ["data.root=x", "student.weights=/far/away/MEALV2_ResNet50_224.pth"]
    assert beside_paper(load_recipe(row, overrides=free), SUMMARY).facts["changed"] == []
    other = beside_paper(load_recipe(row, overrides=["student.weights=/far/other.pth"]), SUMMARY)
    assert other.facts["changed"] == [
        "student.weights=other.pth (there MEALV2_ResNet50_224.pth)",
    ]


def test_errors_and_best_epochs_are_compared_as_the_paper_has_them():
    at = beside_paper(load_recipe("moonshine/cifar10/wrn_40_1/scratch"), SUMMARY)
    assert at.row.pop("accuracy_last") == pytest.approx(0.9352)
    assert at.row == {"run": "paper, Table 2", "note": "error 6.48"}
    assert at.facts["ours"] == pytest.approx(29.69)
    assert "here 29.69 in the last epoch, +23.21 points. " in at.text


def test_iou_is_compared_with_the_mean_over_classes(monkeypatch):
    name = "moonshine/cityscapes/erfnet--erfnet-G:N/at"
    entry = replace(entry_of(), published=find_entry(name).published)
    monkeypatch.setattr("fastkd.report.paper.all_recipes", lambda: {"plain": entry})
    found = beside_paper(build(entry), {"miou_last": 0.6, "miou_best": 0.7})
    assert found.row == {"run": "paper, Table 4", "miou_last": 0.6811, "note": ""}
    assert "the paper's mean class IoU 68.11 (Table 4); here 60.00 in the last ep" in found.text


def test_a_best_epoch_is_compared_with_the_best(monkeypatch):
    printed = find_entry("cifar100/resnet56--resnet20/dkd").published
    entry = replace(entry_of(), published=printed)
    monkeypatch.setattr("fastkd.report.paper.all_recipes", lambda: {"plain": entry})
    found = beside_paper(build(entry), SUMMARY)
    assert found.row == {"run": "paper, mdistiller README", "accuracy_best": 0.7197, "note": ""}
    assert found.text.endswith("here 70.62 in the best epoch, -1.35 points")


def test_a_run_that_no_paper_prints_has_no_row():
    assert beside_paper(load_recipe("quickstart"), SUMMARY) is None
    assert beside_paper(load_recipe(ROW, overrides=["name=mine"]), SUMMARY) is None
    assert isinstance(load_recipe(ROW), Recipe)


def test_transfer_lacks_nothing():
    rows = {name: entry for name, entry in all_recipes().items() if name.startswith("transfer/")}
    assert len(rows) == 20
    for name, entry in rows.items():
        data = name.split("/")[1]
        assert missing(entry) == ()
        losses = {key.split(".")[1] for key in entry.keys if key.startswith("losses.")}
        assert losses == ({"bce"} if data == "voc2007" else {"ce"})
        recipe = build(entry)
        assert recipe.data.name == data
        assert recipe.student.frozen == ("backbone" if name.endswith("/linear") else None)
        assert recipe.student.new_head == ("-meal_v2/" in name)
        assert recipe.optim.lr == (0.1 if name.endswith("/linear") else 0.01)
