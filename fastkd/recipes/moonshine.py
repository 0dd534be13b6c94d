"""Rows of "Moonshine: Distilling with Cheap Convolutions" (arXiv:1711.02613), tables 2, 3 and 4.

A student is the teacher with its 3x3 convolutions replaced by a cheap block, or a smaller
network: `wrn_40_2--wrn_40_2-G:4/at`. `scratch` is without a teacher. The paper prints errors.

KD: the table was made with the formula of the released code, element-wise mean and a factor of 2,
which per sample is 2 alpha T^2 / C KL; `:paper` has the alpha T^2 KL of equation 1. AT: equation 2
has the norm of the difference, the code its mean square, which is the form here.
"""

import re
from typing import Any

from fastkd.recipes.entry import Entry, by_cell
from fastkd.recipes.published import Published, cells

__all__ = ["recipes"]

CIFAR: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 128,
    "data.drop_last": False,
    "augment.padding": 4,
    "optim.lr": 0.1,
    "optim.momentum": 0.9,
    "optim.weight_decay": 5e-4,
    "optim.milestones": [60, 120, 160],
    "optim.gamma": 0.2,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "cifar10": CIFAR
    | {
        "data.name": "cifar10",
        "data.mean": [0.4914, 0.4822, 0.4465],
        "data.std": [0.2023, 0.1994, 0.2010],
    },
    "cifar100": CIFAR
    | {
        "data.name": "cifar100",
        "data.mean": [0.5071, 0.4866, 0.4409],
        "data.std": [0.2009, 0.1984, 0.2023],
    },
    "imagenet": {
        "epochs": 100,
        "batch_size": 256,
        "data.name": "folder",
        "data.image_size": 224,
        "data.mean": [0.485, 0.456, 0.406],
        "data.std": [0.229, 0.224, 0.225],
        "data.drop_last": False,
        "augment.crop": "resized",
        "optim.lr": 0.1,
        "optim.momentum": 0.9,
        "optim.weight_decay": 1e-4,
        "optim.milestones": [30, 60, 90],
        "optim.gamma": 0.1,
        "student.stem": "imagenet",
    },
    "cityscapes": {
        "epochs": 150,
        "batch_size": 6,
        "data.name": "cityscapes",
        "augment.crop": "shift",
        "augment.padding": 2,
        "optim.name": "adam",
        "optim.lr": 5e-4,
        "optim.weight_decay": 1e-4,
        "optim.schedule": "poly",
        "losses.ce.class_weights": "cityscapes",
    },
}
CODE = "the released code"
ERFNET = "ERFNet's code, which the paper refers to"
SOURCES: dict[str, dict[str, str]] = {
    "cifar10": {
        "data.mean": CODE,
        "data.std": CODE,
        "data.drop_last": CODE,
        "augment.padding": f"{CODE}; the width is not stated in our copy",
        "optim.weight_decay": f"{CODE}: on every tensor",
        "losses.kd.weight": f"{CODE}: 2 alpha / number of classes, alpha = 0.9",
    },
    "imagenet": {
        "data.image_size": "not stated; the multiply-adds of table 3 fit 224 pixels",
        "data.mean": "torchvision's, like the teacher",
        "data.std": "torchvision's, like the teacher",
        "data.drop_last": "not stated",
        "augment.crop": "the usual random resized crop; not stated",
        "optim.weight_decay": "the authors' other ImageNet code; the number is not in our copy",
    },
    "cityscapes": {
        key: ERFNET
        for key in (
            "epochs",
            "batch_size",
            "augment.crop",
            "augment.padding",
            "optim.name",
            "optim.lr",
            "optim.weight_decay",
            "optim.schedule",
            "losses.ce.class_weights",
        )
    },
}
SOURCES["cifar100"] = SOURCES["cifar10"]
NOTES = {
    "imagenet": "data.root is ImageNet as folders: train/ and val/, one folder a class.",
    "cityscapes": "ERFNet's encoder is trained first, for 150 epochs on labels at an eighth of the "
    "size (AT: layers 7, 12 and 16, beta 1000). These keys are the second stage; set its initial "
    "weights with student.weights. Whether the student's convolutions have a bias is not known.",
}
AT_NOTE = (
    "Equation 2 has the norm of the difference of the maps; beta belongs to the mean square of the "
    "released code, which is what runs."
)
LAYERS = {"cifar10": 3, "cifar100": 3, "imagenet": 4, "cityscapes": 5}


def recipes() -> dict[str, Entry]:
    """Entries of this module by name."""
    entries = by_cell(cells("moonshine"), _of)
    for entry in [*entries.values()]:
        if entry.name.endswith("/kd"):
            other = entry.in_mode(
                "paper",
                {**entry.keys, "losses.kd.weight": 0.9},
                "Equation 1 of the text weighs the teacher more than the formula that the table "
                "was made with: 5 times with 10 classes, 50 times with 100.",
            )
            entries[other.name] = other
    return entries


def _of(cell: Published) -> Entry:
    if cell.table == "2":
        dataset, method = cell.column.split()
        size, block = cell.row.split()
        return _entry(dataset, "wrn_40_2", f"wrn_{size.replace('-', '_')}", method, block=block)
    if cell.table == "3":
        match = re.fullmatch(r"Res(\d\d)(?:-(G\(.+\))|-(0\.5))?", cell.row)
        assert match is not None
        width = float(match[3]) if match[3] else None
        student = f"resnet{match[1]}"
        return _entry(
            "imagenet", "resnet34", student, cell.column, block=match[2] or "S", width=width
        )
    _, _, block = cell.row.partition("-")
    return _entry("cityscapes", "erfnet", "erfnet", cell.column, block=block or "S")


def _entry(
    dataset: str,
    teacher: str,
    network: str,
    method: str,
    *,
    block: str,
    width: float | None = None,
) -> Entry:
    keys = SETTINGS[dataset] | {"student.name": network}
    student = network
    if block != "S":
        keys |= {"student.block": block}
        student += "-" + re.sub(r"[(,/]", ":", block).rstrip(")")
    if width is not None:
        keys |= {"student.width": width}
        student += f"-{width:g}"
    alone = method == "scratch"
    if alone:
        keys |= {"losses.ce.weight": 1.0}
    elif dataset == "imagenet":
        keys |= {"teacher.name": f"torchvision:{teacher}", "teacher.pretrained": True}
    else:
        keys |= {"teacher.name": teacher, "teacher.train": True}
    if method == "kd":
        keys |= {
            "losses.kd.weight": {"cifar10": 0.18, "cifar100": 0.018}[dataset],
            "losses.kd.ce_weight": 0.1,
            "losses.kd.temperature": 4.0,
        }
    notes = [NOTES[dataset]] if dataset in NOTES else []
    if method == "at":
        notes.append(AT_NOTE)
        layers = LAYERS[dataset]
        teacher_tap = "layer{}" if dataset == "imagenet" else "stage{}"
        keys |= {
            "losses.ce.weight": 1.0,
            "losses.at.weight": 3000.0 / layers,
            "losses.at.pairs": {f"stage{n}": teacher_tap.format(n) for n in range(1, layers + 1)},
        }
    taught = f"{teacher} teaches {student} on {dataset} by {method}"
    return Entry(
        name=f"moonshine/{dataset}/{student if alone else f'{teacher}--{student}'}/{method}",
        description=f"{student} on {dataset}, no teacher" if alone else taught,
        keys=keys,
        sources=SOURCES[dataset],
        note=" ".join(notes),
        mode="paper" if alone else "released",
    )
