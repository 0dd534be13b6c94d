"""`fastkd recipes`: overview, list and one recipe, as a stranger reads them."""

import fnmatch
import json

import pytest

from fastkd.recipes.catalogue import all_recipes, find_entry
from fastkd.recipes.loading import build
from fastkd.recipes.missing import missing

ROW = "kdda/cifar100/wrn_40_2--wrn_16_2/tlcutmix"


def test_the_overview_counts_by_paper_and_data_set(command):
    said = command("recipes").out
    lines = said.splitlines()
    assert lines[0].startswith("quickstart  digits")
    counted = {line.split()[0]: int(line.split()[1]) for line in lines if line.endswith(" recipes")}
    rows = [name for name, entry in all_recipes().items() if entry.row is None]
    assert lines[1].startswith("folder  a folder")
    in_full = [line for line in lines if line.strip().split("  ")[0] in rows]
    without_papers = ("rsb/", "van", "fun", "camvid/")
    assert len(in_full) == 3 + len([n for n in rows if n.startswith(without_papers)])
    assert sum(counted.values()) + len(in_full) == len(rows)
    assert counted["moonshine/cifar10/"] == 76
    assert counted["demystification/cifar100/"] == 6 * (36 + 16)
    assert "fastkd recipes show NAME" in said
    assert len(lines) < 60


def test_the_overview_loads_nothing_heavy(program, tmp_path):
    code = """
import sys
from fastkd.cli.commands import main
assert main(["recipes"]) == 0
heavy = "torch triton timm torchvision matplotlib sklearn numpy pydantic rich".split()
assert not set(heavy) & set(sys.modules), set(heavy) & set(sys.modules)"""
    assert program("-c", code, cwd=tmp_path).err == ""


def test_a_list_has_the_papers_numbers_and_what_is_missing(command):
    *lines, _, last = command("recipes", "kdda/cifar100/wrn_40_2--wrn_16_2/*").out.splitlines()
    by_name = {line.split()[0]: line for line in lines}
    rows = {n: e for n, e in all_recipes().items() if n.startswith(ROW.rpartition("/")[0] + "/")}
    assert set(by_name) == {name for name, entry in rows.items() if entry.row is None}
    for name, line in by_name.items():
        assert str(rows[name].published[0]) in line
        lacks = missing(rows[name])
        assert line.endswith(f"not runnable, needs {', '.join(lacks)}") or not lacks
    runnable = sum(not missing(rows[name]) for name in by_name)
    assert last.startswith(f"{len(lines)} recipes, {runnable} runnable.")


def test_the_other_mode_is_listed_where_it_is_asked_for(command):
    found = command("recipes", "kdda/*wrn_16_2/tlcutmix-pick*:released").out.splitlines()
    names = {line.split()[0] for line in found[:-2]}
    assert "kdda/cifar100/wrn_40_2--wrn_16_2/tlcutmix-pick@960:released" in names
    assert all(find_entry(name).mode == "released" for name in names)


def test_one_recipe_in_full(command):
    said = command("recipes", "show", ROW)
    assert said.code == 0
    assert said.out.startswith(f"{ROW}\nwrn_40_2 teaches wrn_16_2 on cifar100 by tlcutmix, by the")
    assert f"\nfastkd train {ROW} data.root=DIR\n" in said.out
    for table in (1, 2, 3, 9):
        assert f"top-1 accuracy 75.34 +- 0.19  (Table {table}, " in said.out
    lines = {line.split()[0]: line for line in said.out.splitlines() if line.startswith("  ")}
    assert lines["losses.kd.temperature"].split() == ["losses.kd.temperature", "4.0"]
    assert "0.0005" in lines["optim.weight_decay"]
    assert lines["optim.weight_decay"].endswith("not from the paper: RepDistiller's code")
    assert lines["losses.kd.views"].split()[1] == "x,xprime"


@pytest.mark.parametrize(
    ("name", "defaults", "sources"),
    [
        (
            "cifar100/wrn_40_2--wrn_16_2/dkd",
            {"alpha": "1.0", "temperature": "4.0", "warmup_epochs": "20.0", "standardize": "false"},
            {"ce": "torch.nn", "dkd": "arXiv:2203.08679"},
        ),
        (
            "cifar10/resnet32x4--resnet8x4/reviewkd",
            {"max_width": "512", "warmup_epochs": "20.0"},
            {"reviewkd": "arXiv:2104.09044"},
        ),
        (
            "cifar100/wrn_40_2--shufflenetv1/simkd",
            {"factor": "2"},
            {"simkd": "arXiv:2203.14001"},
        ),
        ("cifar10/resnet56--resnet20/dist", {"gather": "true"}, {"dist": "arXiv:2205.10536"}),
    ],
)
def test_every_number_of_a_loss_is_shown_with_its_source(command, name, defaults, sources):
    said = command("recipes", "show", name).out
    assert "\nSetting of CRD (arXiv:1910.10699) and its code, RepDistiller." in said
    assert ("\nno number from a printed table\n" in said) == (not find_entry(name).published)
    lines = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line[:2] == "  "}
    loss = name.rpartition("/")[2]
    for key, value in defaults.items():
        assert lines[f"losses.{loss}.{key}"] == [value, "default"]
    recipe = build(find_entry(name))
    for used, keys in recipe.losses.items():
        assert {f"losses.{used}.{key}" for key in type(keys).model_fields} <= lines.keys()
    for used, source in sources.items():
        assert source in " ".join(lines[f"{used}:"])


@pytest.mark.parametrize(
    ("word", "pattern"),
    [
        ("kdda", "kdda/*"),
        ("moonshine/", "moonshine/*"),
        ("kdda/cifar100", "kdda/cifar100/*"),
        ("cifar10", "cifar10/*"),
        ("cifar10/resnet20", "cifar10/resnet20"),
        ("resnet56--resnet20", "*/resnet56--resnet20/*"),
        ("tlcutmix", "*/tlcutmix"),
        ("tlcutmix-pick@960:released", "*/tlcutmix-pick@960:released"),
    ],
)
def test_a_word_lists_what_is_below_it_or_has_it_in_its_path(command, word, pattern):
    said = command("recipes", word)
    assert (said.code, said.out) == (0, command("recipes", pattern).out)
    names = [line.split()[0] for line in said.out.splitlines()[:-2]]
    assert names == [
        name
        for name, entry in all_recipes().items()
        if fnmatch.fnmatchcase(name, pattern) and (entry.row is None or ":" in word)
    ]


@pytest.mark.parametrize("word", ["kdd", "cut", "kdda/tlcutmix", "*nothing*", ""])
def test_a_word_that_is_in_no_path_is_refused(command, word):
    said = command("recipes", word)
    assert said.code == 2
    assert f"no recipe matches {word!r}; expected a part of a name, such as kdda" in said.err


def test_the_printed_command_asks_for_every_file_of_the_reader(command):
    """Data that are not made here, and weights whose file does not come with fastkd."""
    shown = 0
    for name in ("quickstart", ROW, *(n for n in all_recipes() if n.startswith("transfer/"))):
        said, entry = command("recipes", "show", name).out, find_entry(name)
        words = [name]
        words += ["data.root=DIR"] if name != "quickstart" else []
        if "-meal_v2/" in name:
            words.append("student.weights=FILE")
            assert "student.weights=FILE is MEALV2_ResNet50_224.pth of the authors' release" in said
        assert ("student.weights" in entry.keys) == (words[-1] == "student.weights=FILE")
        printed = [line.split() for line in said.splitlines() if line.startswith("fastkd train")]
        assert printed == ([] if missing(entry) else [["fastkd", "train", *words]])
        shown += len(printed)
    assert shown == 2 + 20


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("moonshine/cifar10/wrn_40_1/scratch", None),
        (
            "moonshine/cifar10/wrn_40_2--wrn_40_1/kd",
            "kd:paper, by the text of the paper: losses.kd.weight=0.9",
        ),
        (
            "kdda/imagenet/resnet34--resnet18/tlcutmix-pick",
            None,
        ),
        (
            f"{ROW}-pick:released",
            "tlcutmix-pick, by the text of the paper: no augment.pick.images, augment.pick.share",
        ),
    ],
)
def test_the_other_mode_is_shown_by_its_difference(command, name, other):
    said = command("recipes", "show", name).out
    others = [line for line in said.splitlines() if ", by the " in line][1:]
    assert len(others) == (other is not None)
    assert other is None or other in others[0]


def test_machines_read_the_same(command):
    found = json.loads(command("recipes", f"{ROW}*", "--json").out)
    assert found[0]["name"] == ROW
    assert found[0]["published"][0] == {
        "paper": "kdda",
        "table": "1",
        "row": "KD+TLCutMix",
        "column": "WRN-40-2/WRN-16-2",
        "metric": "top1",
        "value": 75.34,
        "std": 0.19,
        "epoch": None,
    }
    assert found[0]["needs"] == []
    assert found[0]["keys"]["augment.xprime"] == "cutmix"
    (one,) = json.loads(command("recipes", "show", ROW, "--json").out)
    assert one == found[0]


def test_all_are_listed_without_a_mistake_in_their_keys(command):
    """`missing` raises where a key exists and its value is wrong."""
    *_, last = command("recipes", "*").out.splitlines()
    rows = [entry for entry in all_recipes().values() if entry.row is None]
    assert last.startswith(f"{len(rows)} recipes, ")
