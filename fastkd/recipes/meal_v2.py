"""Rows of "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks"
(arXiv:2009.08453), tables 3 to 6 and the numbers in sections 6.2 and 6.3.

A pretrained student imitates the mean probability of two pretrained teachers by soft cross entropy;
a discriminator keeps it distinguishable from them. No labels, no weight decay. `:released` follows
the code where it contradicts the text. Weights are pinned by timm's tags, because timm's bare
names have since come to mean other weights. `transfer/` are the rows of table 6: a new head on the
backbone (`student.new_head`), which is tuned with it or stays as it is (`student.frozen`). Table 7
is detection, which fastkd does not train; torchvision's RetinaNet takes a run's backbone
(tests/runs/test_transfer.py). Rows quoted from other papers are left out.
"""

from typing import Any

from fastkd.recipes.entry import Entry, by_cell
from fastkd.recipes.published import Published, cells

__all__ = ["recipes"]

SETTING: dict[str, Any] = {
    "epochs": 180,
    "batch_size": 512,
    "data.name": "folder",
    "data.mean": [0.485, 0.456, 0.406],
    "data.std": [0.229, 0.224, 0.225],
    "data.drop_last": False,
    "augment.crop": "resized",
    "optim.lr": 0.01,
    "optim.momentum": 0.9,
    "optim.weight_decay": 0.0,
    "optim.milestones": [100],
    "optim.gamma": 0.1,
}
TEACHERS = {
    224: ("senet154.gluon_in1k", "resnet152s.gluon_in1k"),
    380: ("tf_efficientnet_b4.ns_jft_in1k", "tf_efficientnet_b4.aa_in1k"),
}
PAIRS = {224: "senet154+resnet152s", 380: "tf_efficientnet_b4.ns+tf_efficientnet_b4.aa"}
RESNET50 = ("resnet50", "resnet50.ram_in1k", 224, "")
# Row -> student, its initial weights in timm, side in pixels, anything else.
ROWS: dict[str, tuple[str, str | None, int, str]] = {
    "ResNet-50": RESNET50,
    "ResNet-50, timm": RESNET50,
    "ResNet-50 at 380": (*RESNET50[:2], 380, ""),
    "ResNet-50 + CutMix": (*RESNET50[:3], "cutmix"),
    "ResNet-50, random": ("resnet50", None, 224, "random_init"),
    "ResNet-50, torchvision": ("resnet50", "resnet50.tv_in1k", 224, "torchvision_init"),
    "ResNet-18": ("resnet18", "resnet18.tv_in1k", 224, ""),
    "MobileNet V3-Small 0.75": (
        "tf_mobilenetv3_small_075",
        "tf_mobilenetv3_small_075.in1k",
        224,
        "",
    ),
    "MobileNet V3-Small 1.0": (
        "tf_mobilenetv3_small_100",
        "tf_mobilenetv3_small_100.in1k",
        224,
        "",
    ),
    "MobileNet V3-Large 1.0": (
        "tf_mobilenetv3_large_100",
        "tf_mobilenetv3_large_100.in1k",
        224,
        "",
    ),
    "EfficientNet-B0": ("tf_efficientnet_b0", "tf_efficientnet_b0.aa_in1k", 224, ""),
    "EfficientNet-B0, tf": ("tf_efficientnet_b0", "tf_efficientnet_b0.aa_in1k", 224, ""),
    "EfficientNet-B0, ra": ("efficientnet_b0", "efficientnet_b0.ra_in1k", 224, ""),
}
CODE = "the released code"
SOURCES = {
    "data.mean": f"{CODE}; also for the MobileNets, whose weights expect 0.5",
    "data.std": f"{CODE}; also for the MobileNets, whose weights expect 0.5",
    "data.drop_last": CODE,
    "optim.momentum": CODE,
    "losses.soft_ce.weight": CODE,
    "losses.discriminator.weight": CODE,
    "losses.discriminator.lr_rule": f"{CODE}: its rate is the student's, as the authors state for "
    "published models",
}

TRANSFER = {"VOC2007": "voc2007", "CUB200-2011": "cub200", "Birdsnap": "birdsnap"} | {
    "CIFAR-10": "cifar10"
}
TRANSFER_SETTING: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 128,
    "data.image_size": 224,
    "data.mean": SETTING["data.mean"],
    "data.std": SETTING["data.std"],
    "data.drop_last": False,
    "augment.crop": "resized",
    "optim.momentum": 0.9,
    "optim.weight_decay": 1e-4,
    "optim.schedule": "constant",
}
TRANSFER_SOURCES = {
    "data.mean": "the backbone's",
    "data.std": "the backbone's",
    "data.drop_last": "the released code, in distillation",
    "optim.schedule": "not stated how the rate falls",
    "student.name": "not stated which weights are the base: timm's, where MEAL V2 starts",
    "student.weights": "the file of the authors' release",
}
UNSTATED = "not stated for training from scratch; the paper's setting of fine-tuning"
FROM_SCRATCH = dict.fromkeys(("epochs", "batch_size", "optim.lr", "optim.weight_decay"), UNSTATED)
WEIGHTS = "MEALV2_ResNet50_224.pth"
RELEASE = (
    f" student.weights=FILE is {WEIGHTS} of the authors' release v1.0.0 at "
    "github.com/szq0214/MEAL-V2, or any other with the keys of timm's resnet50."
)
FOLDERS = {
    "cifar10": "The paper enlarges the images without saying how; here bilinearly.",
    "cub200": "data.root is CUB-200-2011 as released, or sorted into class folders below train/ "
    "(5,994 images) and test/ (5,794).",
    "birdsnap": "data.root is Birdsnap as released, with the images that its program fetched, or "
    "sorted into class folders below train/ (47,386 images) and test/ (2,443).",
    "voc2007": "data.root is VOCdevkit with trainval (5,011 images) and test (4,952). The paper "
    "does not say which mAP it uses; here the area, not the 11 points.",
}
FROZEN = " The frozen batch norms use and keep the statistics of the weights; the paper is silent."


def recipes() -> dict[str, Entry]:
    """Entries of this module by name."""
    entries = by_cell(
        cells("meal_v2"), lambda cell: _transfer(cell) if cell.table == "6" else _of(cell)
    )
    for entry in [*entries.values()]:
        if entry.name.startswith("meal_v2/"):
            other = _released(entry)
            entries[other.name] = other
    return entries


def _of(cell: Published) -> Entry:
    student, weights, side, more = ROWS[cell.row]
    first, *others = ({"name": f"timm:{name}", "pretrained": True} for name in TEACHERS[side])
    view = "xprime" if more == "cutmix" else "x"
    keys = SETTING | {
        "data.image_size": side,
        "student.name": f"timm:{weights or student}",
        "student.pretrained": weights is not None,
        **{f"teacher.{key}": value for key, value in first.items()},
        "teacher.ensemble": others,
        "losses.soft_ce.weight": 1.0,
        "losses.discriminator.weight": 1.0,
        "losses.discriminator.lr_rule": "released",
    }
    if view == "xprime":
        keys |= {"augment.xprime": "cutmix"}
        keys |= {"losses.soft_ce.view": view, "losses.discriminator.view": view}
    if weights is None:
        keys |= {"epochs": 300, "optim.lr": 0.1, "optim.milestones": [120, 220]}
    what = f"{side}px" + (f"-{more}" if more else "")
    return Entry(
        name=f"meal_v2/imagenet/{PAIRS[side]}--{student}/{what}",
        description=f"{PAIRS[side]} teach {student} on imagenet, {what.replace('-', ', ')}",
        keys=keys,
        sources=SOURCES,
        note="data.root is ImageNet as folders: train/ and val/, one folder a class."
        + ("" if weights else " 120 epochs at 0.1 come before the usual 180."),
        mode="paper",
    )


def _released(entry: Entry) -> Entry:
    """The rate falls an epoch later; all commands except ResNet-50 at 224 run 200 epochs."""
    *before, last = entry.keys["optim.milestones"]
    changed: dict[str, Any] = {
        "losses.discriminator.last_relu": True,
        "optim.milestones": [*before, last + 1],
    }
    if entry.keys["data.image_size"] == 380 or "resnet50" not in entry.keys["student.name"]:
        changed["epochs"] = 200
    return entry.in_mode(
        "released",
        {**entry.keys, **changed},
        "The code has 101 epochs at the first rate, clips the discriminator's outputs at 0, and "
        "its commands for 380 pixels and for small networks train 200 epochs.",
        dict.fromkeys(changed, CODE),
    )


def _transfer(cell: Published) -> Entry:
    dataset = TRANSFER[cell.column]
    how, _, backbone = cell.row.partition(", ")
    frozen = how == "Frozen backbone"
    labels = {"losses.bce.weight": 1.0} if dataset == "voc2007" else {"losses.ce.weight": 1.0}
    keys = (
        TRANSFER_SETTING
        | labels
        | {
            "data.name": dataset,
            "optim.lr": 0.1 if frozen else 0.01,
            "student.name": "timm:resnet50.ram_in1k",
        }
    )
    if backbone == "MEAL V2":
        keys |= {"student.weights": WEIGHTS, "student.new_head": True}
    else:
        keys |= {"student.pretrained": how != "From scratch"}
    if frozen:
        keys |= {"student.frozen": "backbone"}
    start = {"base model": "base", "MEAL V2": "meal_v2", "": "random"}[backbone]
    method = "linear" if frozen else "scratch" if not backbone else "finetune"
    return Entry(
        name=f"transfer/{dataset}/resnet50-{start}/{method}",
        description=f"resnet50 ({backbone or 'random'} weights) on {dataset}, {how.lower()}",
        keys=keys,
        sources=TRANSFER_SOURCES | (FROM_SCRATCH if method == "scratch" else {}),
        note=FOLDERS[dataset]
        + (RELEASE if backbone == "MEAL V2" else "")
        + (FROZEN if frozen else ""),
        mode="paper",
    )
