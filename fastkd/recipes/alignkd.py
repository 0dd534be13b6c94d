"""Rows of the AlignKD paper, tables 1 to 3, and the baselines that it leaves out.

A ResNet teaches the plain CNN that remains when its shortcuts are removed, by the stages' mean
square error and the logits (`alignkd`), or by sending the student's features through the teacher's
stages (`jointrd`, as the paper writes JointRD). `jointrd:released` is the code of JointRD
(NeurIPS 2020). `plain18/scratch` and `kd` are ours: without them the tables cannot show that either
method helps. Of table 3 the copy of the paper we had states only the teachers' numbers.
"""

from typing import Any

from fastkd.recipes.entry import Entry, by_cell
from fastkd.recipes.published import Published, cells

__all__ = ["recipes"]

DATASETS = {"1": "cifar10", "2": "cifar100", "3": "imagewoof"}
SETTING: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 128,
    "data.drop_last": False,
    "optim.lr": 0.1,
    "optim.momentum": 0.9,
    "optim.nesterov": False,
    "optim.weight_decay": 5e-4,
    "optim.schedule": "onecycle",
}
DATA: dict[str, dict[str, Any]] = {
    "cifar10": {
        "data.name": "cifar10",
        "data.mean": [0.4914, 0.4822, 0.4465],
        "data.std": [0.2023, 0.1994, 0.2010],
        "augment.padding": 4,
    },
    "cifar100": {
        "data.name": "cifar100",
        "data.mean": [0.5071, 0.4867, 0.4408],
        "data.std": [0.2675, 0.2565, 0.2761],
        "augment.padding": 4,
    },
    "imagewoof": {
        "data.name": "folder",
        "data.image_size": 224,
        "data.mean": [0.485, 0.456, 0.406],
        "data.std": [0.229, 0.224, 0.225],
        "augment.crop": "resized",
    },
}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
KD = {"losses.kd.weight": 0.5, "losses.kd.ce_weight": 0.5, "losses.kd.temperature": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "kd": KD,
    "alignkd": KD
    | {
        "losses.stage_mse.weight": 1.0,
        "losses.stage_mse.pairs": {stage: stage for stage in STAGES},
        "losses.stage_mse.eta_epochs": 60,
        "losses.stage_mse.eta_end": 0.5,
        "losses.stage_mse.reduction": "mean",
    },
    "jointrd": {
        "losses.ce.weight": 1.0,
        "losses.jointrd.weight": 1.0,
        "losses.jointrd.feature_weight": 1e-3,
        "losses.jointrd.stages": STAGES,
        "losses.jointrd.eta_epochs": 60,
        "losses.jointrd.eta_end": 0.5,
        "losses.jointrd.feature": "pooled",
        "losses.jointrd.form": "paper",
    },
}
SOURCES = {
    "batch_size": "not stated; JointRD's code",
    "data.drop_last": "not stated; JointRD's code",
    "data.image_size": "not stated, nor which version of Imagewoof",
    "data.mean": "not stated",
    "data.std": "not stated",
    "augment.padding": "not stated; JointRD's code",
    "augment.crop": "not stated",
    "optim.momentum": "not stated; OneCycle takes it through 0.95, 0.85 and back",
    "optim.nesterov": "not stated; the authors of JointRD have it",
    "optim.weight_decay": "not stated; JointRD's code",
    "losses.kd.temperature": "no temperature is named",
    "losses.stage_mse.reduction": "the text has `mse` only, of the stages' outputs",
    "losses.jointrd.feature": "our reading: equation 2 has the logits (feature=logits), sections "
    "3.2 and 6 flattened features of the last layer, which pooled and map both could be",
}
STEM = "the paper removes only the pooling; a 3x3 convolution of stride 1 fits the CIFAR-100 table"
FOR_CIFAR = {"student.stem": STEM, "teacher.stem": STEM}
IMAGEWOOF = (
    "data.root is Imagewoof as folders: train/ and val/, one folder a class. Our copy of the paper "
    "states only the teachers' values."
)


def recipes() -> dict[str, Entry]:
    """Entries of this module by name, in the order of the tables."""
    runs = [
        _entry(dataset, depth, method)
        for dataset in DATASETS.values()
        for depth in ("18", "34")
        for method in ("resnet", "plain", *METHODS)
    ]
    entries = {entry.name: entry for entry in runs} | by_cell(cells("alignkd"), _of)
    for entry in [*entries.values()]:
        if entry.name.endswith("/jointrd"):
            other = _released(entry)
            entries[other.name] = other
    return entries


def _of(cell: Published) -> Entry:
    return _entry(DATASETS[cell.table], cell.row, cell.column.lower())


def _entry(dataset: str, depth: str, method: str) -> Entry:
    alone = method in ("resnet", "plain")
    teacher, student = f"resnet{depth}", f"plain{depth}"
    if method == "resnet":
        student = teacher
    keys = SETTING | DATA[dataset] | {"student.name": student}
    stem = "imagenet" if dataset == "imagewoof" else "cifar"
    keys |= {"student.stem": stem}
    if alone:
        keys |= {"losses.ce.weight": 1.0}
    else:
        keys |= {"teacher.name": teacher, "teacher.train": True, "teacher.stem": stem}
        keys |= METHODS[method]
    taught = f"{teacher} teaches {student} on {dataset} by {method}"
    return Entry(
        name=f"alignkd/{dataset}/{student}/scratch"
        if alone
        else f"alignkd/{dataset}/{teacher}--{student}/{method}",
        description=f"{student} on {dataset}, no teacher" if alone else taught,
        keys=keys,
        sources=SOURCES | (FOR_CIFAR if stem == "cifar" else {}),
        note=IMAGEWOOF if dataset == "imagewoof" else "",
        mode="paper",
    )


def _released(entry: Entry) -> Entry:
    """JointRD's own code and schedule, its JOINT branch."""
    changed: dict[str, Any] = {
        "student.shortcuts": "projection",
        "losses.ce.weight": 0.25,
        "losses.jointrd.weight": 0.25,
        "losses.jointrd.form": "released",
        "optim.nesterov": True,
        "optim.schedule": "multistep",
        "optim.milestones": [100, 150],
        "optim.gamma": 0.1,
    }
    keys = {**entry.keys, **changed}
    del keys["losses.jointrd.feature"]
    return entry.in_mode(
        "released",
        keys,
        "JointRD's code: projections stay in the student, margin loss on the last map through "
        "connectors, a quarter of every term, SGD by steps. Its teacher is trained alongside; here "
        f"it is trained before. {entry.note}".strip(),
        # The momentum is 0.9 as before, but no schedule takes it through others.
        dict.fromkeys([*changed, "optim.momentum"], "JointRD's code"),
    )
