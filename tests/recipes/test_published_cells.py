"""Every printed number, cell by cell: published.json against a second transcription of the papers.

published_sums.json holds a checksum of every table, so that no digit changes unnoticed. The second
transcription, oracle-accuracy.json and oracle-kdda.json, is compared where it lies: in
shared/spec/ beside the repository, or in the folder FASTKD_TEST_ORACLES.
"""

import hashlib
import json
import os
from pathlib import Path

import pytest

from fastkd.recipes.published import cells, papers

HERE = Path(__file__)
ORACLES = Path(os.environ.get("FASTKD_TEST_ORACLES", HERE.parents[3] / "shared" / "spec"))

# What the oracles lack or have wrong, read in the papers.
# Table 9 of the data augmentation paper: deviations of KD, and of two rows that the oracle garbled.
KD_DEVIATIONS = (0.28, 0.27, 0.25, 0.19, 0.32, 0.13, 0.27)
AT_DEVIATIONS = (0.27, 0.07, 0.13, 0.15, 0.24, 0.14, 0.13)
CC_DEVIATIONS = (0.27, 0.24, 0.28, 0.27, 0.46, 0.09, 0.18)
# MEAL V2, section 6.3 and table 6.
INITIAL_WEIGHTS = {
    "ResNet-50, random": 77.07,
    "ResNet-50, torchvision": 79.48,
    "ResNet-50, timm": 80.67,
    "EfficientNet-B0, tf": 78.29,
    "EfficientNet-B0, ra": 78.23,
}
TRANSFER = {
    "From scratch": "72.20 58.90 66.97 94.71",
    "Fine-tune, base model": "94.00 80.70 75.28 97.24",
    "Fine-tune, MEAL V2": "95.10 83.70 75.55 97.26",
    "Frozen backbone, base model": "87.50 66.27 55.01 81.69",
    "Frozen backbone, MEAL V2": "90.80 68.29 53.56 84.16",
}


def checksum(table):
    said = [table["columns"], table["metric"], table.get("epoch"), list(table["rows"].items())]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def test_no_digit_changes_unnoticed():
    """After a correction of published.json: put the sums that the message shows into the file."""
    found = {
        f"{paper}, {name}": checksum(table)
        for paper, source in papers().items()
        for name, table in source["tables"].items()
    }
    kept = json.loads(HERE.with_name("published_sums.json").read_text())
    assert found == kept


def test_a_checksum_sees_a_digit_and_a_place():
    table = papers()["alignkd"]["tables"]["1"]
    first, second = table["rows"].values()
    for rows in ({"18": [93.58, *first[1:]], "34": second}, {"18": second, "34": first}):
        assert checksum({**table, "rows": rows}) != checksum(table)


def grid(table, columns, rows, metric="top1"):
    """(table, row, column, metric) -> (value, std), without empty cells."""
    found = {}
    for row, values in rows.items():
        metrics = [metric] * len(columns) if isinstance(metric, str) else metric
        for column, kind, value in zip(columns, metrics, values, strict=True):
            if value is not None:
                pair = tuple(value) if isinstance(value, list | tuple) else (value, None)
                assert found.setdefault((table, row, column, kind), pair) == pair
    return found


def moonshine(accuracy, _):
    of_error = ("cifar10_error", "cifar100_error")
    columns = [f"{kind[:-6]} {method}" for kind in of_error for method in ("scratch", "kd", "at")]
    rows = {
        f"{one['network'].removeprefix('WRN-')} {one['block']}": [
            one[kind][method] for kind in of_error for method in ("scratch", "kd", "at")
        ]
        for one in accuracy["moonshine_table2_test_error"]
    }
    found = grid("2", columns, rows, "top1_error")
    imagenet = dict(accuracy["moonshine_table3_imagenet_error"])
    assert imagenet.pop("columns") == ["scratch_top1", "scratch_top5", "at_top1", "at_top5"]
    rows = {row.removesuffix(" (teacher)"): values for row, values in imagenet.items()}
    found |= grid("3", ["scratch"] * 2 + ["at"] * 2, rows, ["top1_error", "top5_error"] * 2)
    iou = accuracy["moonshine_table4_cityscapes_iou"]
    rows = {row: [values["scratch"], values.get("at")] for row, values in iou.items()}
    return found | grid("4", ["scratch", "at"], rows, "class_iou")


def demystification(accuracy, _):
    found = {}
    for one in accuracy["demystification_cifar100_top1"]:
        rows = one["teachers"] | {"Baseline": one["baseline_R"], "NR-baseline": one["baseline_NR"]}
        found |= grid(f"{one['table']} {one['side']}", one["students"], rows)
    return found


def kdda(_, oracle):
    tables = oracle["paper_tables"]
    found = {}
    for name, rows in tables.items():
        number = name.removeprefix("table").partition("_")[0]
        if not name.startswith("table"):
            continue
        columns = rows.get("columns", tables["columns"])
        rows = {row: rows[row] for row in rows.keys() - {"columns", "note", "check"}}
        metric = "top1"
        if number == "5":
            columns, metric = ["ResNet34/ResNet18"] * 2, ["top1", "top5"]
        if number in ("2", "9", "10"):
            # Printed there too: the accuracies of table 3, and ResNet110's of the CRD paper.
            for role in ("teacher", "student"):
                known = dict(zip(tables["columns"], tables["table3_cifar100"][role], strict=True))
                crd = oracle["crd_benchmark"]
                at = crd["same_cols"].index("res110/res20")
                known["ResNet110/ResNet20"] = crd[f"{role}_same"][at]
                rows[role] = [known[column] for column in columns]
        if number == "10":
            rows["KD"] = tables["table3_cifar100"]["KD"]
        if number == "9":
            deviations = {f"{k}+TLCutMix": v for k, v in rows.pop("std_of_TLCutMix_rows").items()}
            deviations |= {"AT+TLCutMix": AT_DEVIATIONS, "CC+TLCutMix": CC_DEVIATIONS}
            for row, stds in (deviations | {"KD": KD_DEVIATIONS}).items():
                rows[row] = list(zip(rows[row], stds, strict=True))
        found |= grid(number, columns, rows, metric)
    return found


def meal_v2(accuracy, _):
    values = accuracy["meal_v2_imagenet_top1_top5"]
    tables = {
        "3": {
            "ResNet-50": "resnet50@224",
            "ResNet-50 at 380": "resnet50@380",
            "ResNet-50 + CutMix": "resnet50@224+cutmix",
        },
        "4": {
            "MobileNet V3-Small 0.75": "mobilenetv3_small_075@224",
            "MobileNet V3-Small 1.0": "mobilenetv3_small_100@224",
            "MobileNet V3-Large 1.0": "mobilenetv3_large_100@224",
            "EfficientNet-B0": "efficientnet_b0@224",
        },
        "5": {"ResNet-50": "resnet50@224", "ResNet-50 + CutMix": "resnet50@224+cutmix"},
        "section 6.2": {"ResNet-18": "resnet18@224"},
    }
    found = {}
    for table, rows in tables.items():
        of_rows = {row: values[key] for row, key in rows.items()}
        found |= grid(table, ["MEAL V2"] * 2, of_rows, ["top1", "top5"])
    found |= grid("section 6.3", ["MEAL V2"], {row: [v] for row, v in INITIAL_WEIGHTS.items()})
    rows = {row: [float(word) for word in words.split()] for row, words in TRANSFER.items()}
    columns = ["VOC2007", "CUB200-2011", "Birdsnap", "CIFAR-10"]
    return found | grid("6", columns, rows, ["map", "top1", "top1", "top1"])


def alignkd(accuracy, _):
    source, found = accuracy["alignkd"], {}
    for number, dataset in enumerate(("cifar10", "cifar100", "imagewoof"), 1):
        value = dict(zip(source["columns"], source[f"{dataset}_top1"], strict=True))
        rows = {
            depth: [value[f"teacher_resnet{depth}"]]
            + [value[f"{method}_plain{depth}"] for method in ("jointrd", "alignkd")]
            for depth in ("18", "34")
        }
        found |= grid(str(number), ["ResNet", "JointRD", "AlignKD"], rows)
    return found


def crd(_, oracle):
    source, found = oracle["crd_benchmark"], {}
    for table, kind in (("1", "same"), ("2", "diff")):
        # Three methods whose published numbers come from a first stage that fastkd lacks.
        rows = {row: values for row, values in source[kind].items() if row not in LEFT_OUT}
        rows |= {role: source[f"{role}_{kind}"] for role in ("teacher", "student")}
        found |= grid(table, source[f"{kind}_cols"], rows)
    return found


LEFT_OUT = ("AB", "FT", "FSP")


def later(_, oracle):
    source = oracle["newer_methods"]

    def on_cifar(pairs):
        skip = ("imagenet", "extra", "note")
        return {pair: value for pair, value in pairs.items() if not pair.startswith(skip)}

    dkd = on_cifar(source["DKD (mdistiller README)"])
    dist = on_cifar(source["DIST (official README)"])
    both = [source["LogitStd (official README)"][name] for name in ("KD+LS", "DKD+LS")]
    assert both[0].keys() == both[1].keys()
    simkd = source["SimKD (official README, teacher resnet32x4 79.42)"]["resnet8x4"]["SimKD_f2"]
    return (
        grid("mdistiller README", ["DKD"], {pair: [value] for pair, value in dkd.items()})
        | grid("DIST README", ["DIST"], {pair: [value] for pair, value in dist.items()})
        | grid(
            "logit-standardization README",
            ["KD+LS", "DKD+LS"],
            {pair: [of[pair] for of in both] for pair in both[0]},
        )
        | grid("SimKD README", ["SimKD"], {"res32x4/res8x4": [simkd]})
    )


TRANSCRIPTIONS = {
    read.__name__: read for read in (moonshine, demystification, kdda, meal_v2, alignkd, crd, later)
}


@pytest.mark.skipif(
    not (ORACLES / "oracle-kdda.json").is_file(), reason=f"no second transcription in {ORACLES}"
)
@pytest.mark.parametrize("paper", TRANSCRIPTIONS)
def test_every_cell_is_that_of_the_second_transcription(paper):
    sources = [
        json.loads((ORACLES / f"oracle-{name}.json").read_text()) for name in ("accuracy", "kdda")
    ]
    found = {
        (cell.table, cell.row, cell.column, cell.metric): (cell.value, cell.std)
        for cell in cells(paper)
    }
    assert found == TRANSCRIPTIONS[paper](*sources)


def test_no_paper_is_left_out():
    assert set(TRANSCRIPTIONS) == set(papers())
