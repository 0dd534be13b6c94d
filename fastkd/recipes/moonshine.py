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
        "data.image_size": 512,
        "data.mean": [0.0, 0.0, 0.0],
        "data.std": [1.0, 1.0, 1.0],
        "data.drop_last": False,
        "augment.padding": 2,
        "optim.name": "adam",
        "optim.lr": 5e-4,
        "optim.weight_decay": 1e-4,
        "optim.schedule": "poly",
        "optim.power": 0.9,
        "losses.ce.class_weights": "erfnet",
        "encoder.label_stride": 8,
    },
}
# Numbers of Eromera/erfnet_pytorch train/main.py, class by class.
OF_ENCODER = """
2.3653597831726 4.4237880706787 2.9691488742828 5.3442072868347 5.2983593940735
5.2275490760803 5.4394111633301 5.3659925460815 3.4170460700989 5.2414722442627
4.7376127243042 5.2286224365234 5.455126285553 4.3019247055054 5.4264230728149
5.4331531524658 5.433765411377 5.4631009101868 5.3947434425354
"""
OF_DECODER = """
2.8149201869965 6.9850029945374 3.7890393733978 9.9428062438965 9.7702074050903
9.5110931396484 10.311357498169 10.026463508606 4.6323022842407 9.5608062744141
7.8698215484619 9.5168733596802 10.373730659485 6.6616044044495 10.260489463806
10.287888526917 10.289801597595 10.405355453491 10.138095855713
"""
CODE = "the released code"
ERFNET = "ERFNet's code, whose setting the paper takes over"
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
        **dict.fromkeys(
            (
                "epochs",
                "batch_size",
                "data.image_size",
                "data.drop_last",
                "augment.padding",
                "optim.name",
                "optim.lr",
                "optim.weight_decay",
                "optim.schedule",
                "optim.power",
                "encoder.label_stride",
            ),
            ERFNET,
        ),
        "data.mean": f"{ERFNET}: pixels in 0..1 as they are",
        "data.std": f"{ERFNET}: pixels in 0..1 as they are",
        "losses.ce.class_weights": "the formula of ERFNet's paper",
    },
}
SOURCES["cifar100"] = SOURCES["cifar10"]
NOTES = {
    "imagenet": "data.root is ImageNet as folders: train/ and val/, one folder a class.",
    "cityscapes": "Two stages of 150 epochs, teacher and student alike: the encoder on labels at "
    "an eighth of the size, then the whole network, which starts from the encoder's best epoch (in "
    "ERFNet's code from its last). With attention, layers 7, 12 and 16 count in the first stage "
    "with beta = 1000, and 19 and 22 as well in the second with 600. ERFNet's code has a 20th "
    "output for pixels that do not count. Whether the student's convolutions have a bias is not "
    "known.",
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
        if "/cityscapes/" in entry.name:
            other = _released(entry)
            entries[other.name] = other
    return entries


def _released(entry: Entry) -> Entry:
    """A row on Cityscapes with the weights of the classes that ERFNet's code lists."""
    words = {"losses.ce.class_weights": OF_DECODER, "encoder.class_weights": OF_ENCODER}
    lists = {key: [float(word) for word in text.split()] for key, text in words.items()}
    return entry.in_mode(
        "released",
        {**entry.keys, **lists},
        f"{entry.note} The weights of the classes are the lists of ERFNet's code: 1 / ln(1.2 + p) "
        f"in the first stage and 1 / ln(1.1 + p) in the second, p being the class's share of all "
        f"pixels, of which 11 percent have no class.",
        dict.fromkeys(lists, ERFNET),
    )


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
        mode="paper" if alone or dataset == "cityscapes" else "released",
    )
