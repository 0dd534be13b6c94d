"""CIFAR recipes in RepDistiller's setting: the CRD benchmark, and the losses that came after it.

Setting: "Contrastive Representation Distillation" (arXiv:1910.10699) and its released code
(RepDistiller): 240 epochs, batch 64, SGD of 0.05 (0.01 for MobileNets and ShuffleNets), 0.1 CE +
0.9 KD at T = 4, one weight per loss for all pairs. The teacher is trained first in the same setting
unless teacher.weights names a checkpoint. On CIFAR-100 normalisation and the partial batch are
theirs too. CIFAR-10, which has no published numbers, keeps the defaults of fastkd for both.
Numbers: the two tables of RepDistiller's README; CRD+KD is not among them and is quoted from a
public derivative of that repository. The later losses have the numbers of their authors' READMEs.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fastkd.recipes.entry import Entry, by_cell
from fastkd.recipes.published import Published, cells

__all__ = ["CIFAR100", "KD", "SCHEDULE", "auxiliary", "recipes", "student_keys", "teacher_keys"]

NETWORKS = {
    "wrn40-2": "wrn_40_2",
    "wrn40-1": "wrn_40_1",
    "wrn16-2": "wrn_16_2",
    **{f"res{size}": f"resnet{size}" for size in ("20", "32", "56", "110", "8x4", "32x4")},
    "vgg8": "vgg8",
    "vgg13": "vgg13",
    "ResNet50": "resnet50",
    "MobileNetV2": "mobilenetv2_half",
    "ShuffleV1": "shufflenetv1",
    "ShuffleV2": "shufflenetv2",
}
SIMILAR = (
    ("wrn_40_2", "wrn_16_2"),
    ("wrn_40_2", "wrn_40_1"),
    ("resnet56", "resnet20"),
    ("resnet110", "resnet20"),
    ("resnet110", "resnet32"),
    ("resnet32x4", "resnet8x4"),
)
DIFFERENT = (
    ("vgg13", "vgg8"),
    ("vgg13", "mobilenetv2_half"),
    ("resnet50", "mobilenetv2_half"),
    ("resnet50", "vgg8"),
    ("resnet32x4", "shufflenetv1"),
    ("resnet32x4", "shufflenetv2"),
    ("wrn_40_2", "shufflenetv1"),
)
LIGHT = ("mobilenetv2_half", "shufflenetv1", "shufflenetv2")
FOUR_STAGES = ("vgg", "mobilenetv2", "resnet50", "resnet18", "resnet34")

SCHEDULE: dict[str, Any] = {
    "epochs": 240,
    "batch_size": 64,
    "augment.padding": 4,
    "optim.lr": 0.05,
    "optim.momentum": 0.9,
    "optim.weight_decay": 5e-4,
    # 150, 180 and 210; as shares they also fit a teacher of another length.
    "optim.milestones": [0.625, 0.75, 0.875],
    "optim.gamma": 0.1,
}
CIFAR100 = {
    "data.name": "cifar100",
    "data.mean": [0.5071, 0.4867, 0.4408],
    "data.std": [0.2675, 0.2565, 0.2761],
    "data.drop_last": False,
}
DATA: dict[str, dict[str, Any]] = {"cifar10": {"data.name": "cifar10"}, "cifar100": CIFAR100}

KD = {"losses.kd.weight": 0.9, "losses.kd.ce_weight": 0.1, "losses.kd.temperature": 4.0}
# Loss -> weight and taps; no taps: the pooled features, which are its default.
AUXILIARY: dict[str, tuple[float, str | None]] = {
    "fitnet": (100.0, "second"),
    "at": (1000.0, "all"),
    "sp": (3000.0, "last"),
    "cc": (0.02, None),
    "vid": (1.0, "all"),
    "rkd": (1.0, None),
    "pkt": (30000.0, None),
    "nst": (50.0, "all"),
    "crd": (0.8, None),
}
# Student -> weight of ReviewKD, where the sources name it and three stages suffice.
REVIEW = {
    **{"wrn_16_2": 5.0, "wrn_40_1": 5.0, "resnet8x4": 5.0, "shufflenetv1": 5.0},
    **{"shufflenetv2": 8.0, "resnet20": 0.6, "resnet32": 1.0},
}
# Pair -> temperature and weight of KD, temperature, weight and beta of DKD, both on standardised
# logits: from the names of the logs that their authors published.
STANDARDIZED = {
    ("wrn_40_2", "wrn_16_2"): ((2, 9), (2, 12, 2)),
    ("wrn_40_2", "wrn_40_1"): ((2, 9), (2, 12, 2)),
    ("resnet56", "resnet20"): ((2, 9), (3, 18, 2)),
    ("resnet110", "resnet20"): ((4, 12), (2, 15, 2)),
    ("resnet110", "resnet32"): ((2, 9), (2, 15, 2)),
    ("resnet32x4", "resnet8x4"): ((2, 9), (2, 9, 8)),
    ("resnet32x4", "shufflenetv2"): ((2, 9), (2, 9, 8)),
    ("vgg13", "vgg8"): ((3, 9), (2, 15, 2)),
    ("vgg13", "mobilenetv2_half"): ((3, 9), (3, 9, 2)),
    ("resnet50", "mobilenetv2_half"): ((3, 1), (2, 15, 2)),
}


SETTING = "Setting of CRD (arXiv:1910.10699) and its code, RepDistiller."
OF_CIFAR10 = (
    f"{SETTING} Theirs is CIFAR-100: normalisation and partial batch are fastkd's defaults."
)
NOTES = {"cifar10": OF_CIFAR10, "cifar100": SETTING}


def student_keys(student: str) -> dict[str, Any]:
    """Its name, and the learning rate if RepDistiller uses another one for it."""
    return {"student.name": student, **({"optim.lr": 0.01} if student in LIGHT else {})}


def teacher_keys(teacher: str, student: str) -> dict[str, Any]:
    """A teacher trained in the same setting, whatever the student's learning rate."""
    keys = {"teacher.name": teacher, "teacher.train": True}
    return keys | ({"teacher.lr": SCHEDULE["optim.lr"]} if student in LIGHT else {})


def stages(network: str) -> int:
    """Stages of a network; both networks of a pair have the same number."""
    return 4 if network.startswith(FOUR_STAGES) else 3


def auxiliary(loss: str, student: str, *, torchvision: bool = False) -> dict[str, Any]:
    """Weight and taps of a loss added to CE or KD. torchvision: the teacher is from torchvision."""
    weight, where = AUXILIARY[loss]
    last = stages(student)
    numbers = {"second": [2], "last": [last], "all": range(1, last + 1), None: []}[where]
    pairs = {f"stage{n}": f"layer{n}" if torchvision else f"stage{n}" for n in numbers}
    if torchvision and where is None:
        pairs = {"pooled": "avgpool"}
    return {f"losses.{loss}.weight": weight} | ({f"losses.{loss}.pairs": pairs} if pairs else {})


def recipes() -> dict[str, Entry]:
    """Entries of this module by name; rows of the benchmark have its numbers."""
    entries = {entry.name: entry for entry in _combinations()}
    return entries | by_cell([*cells("crd"), *cells("later")], lambda cell: _of(cell, entries))


def _combinations() -> Iterator[Entry]:
    for dataset, pairs in (("cifar10", SIMILAR), ("cifar100", SIMILAR + DIFFERENT)):
        for network in dict.fromkeys(network for pair in pairs for network in pair):
            yield Entry(
                name=f"{dataset}/{network}",
                description=f"{network} on {dataset}, no teacher",
                keys=SCHEDULE | DATA[dataset] | student_keys(network) | {"losses.ce.weight": 1.0},
                note=NOTES[dataset],
            )
        for teacher, student in pairs:
            for method, keys in _methods(teacher, student).items():
                yield Entry(
                    name=f"{dataset}/{teacher}--{student}/{method}",
                    description=f"{teacher} teaches {student} on {dataset} by {method}",
                    keys=SCHEDULE
                    | DATA[dataset]
                    | student_keys(student)
                    | teacher_keys(teacher, student)
                    | keys,
                    note=NOTES[dataset],
                )


def _methods(teacher: str, student: str) -> dict[str, dict[str, Any]]:
    """Method -> keys of its losses and of the augmentation."""
    ce: dict[str, Any] = {"losses.ce.weight": 1.0}
    on_both: dict[str, Any] = KD | {"losses.kd.views": ["x", "xprime"]}
    methods: dict[str, dict[str, Any]] = {"kd": KD}
    methods |= {loss: ce | auxiliary(loss, student) for loss in AUXILIARY}
    beside = {"losses.kd.weight": 1.0, "losses.kd.ce_weight": 1.0}
    methods["crd+kd"] = KD | beside | auxiliary("crd", student)
    methods["tlcutmix"] = on_both | {"augment.xprime": "cutmix"}
    methods["tlmixup"] = on_both | {"augment.xprime": "mixup"}
    methods["dkd"] = ce | {"losses.dkd.weight": 1.0, "losses.dkd.beta": _beta(teacher, student)}
    methods["dist"] = ce | {"losses.dist.weight": 2.0, "losses.dist.temperature": 4.0}
    last = f"stage{stages(student)}"
    methods["simkd"] = {
        "losses.simkd.weight": 1.0,
        "losses.simkd.student": last,
        # What a wide ResNet pools; its last stage is a raw sum.
        "losses.simkd.teacher": f"{last}:preact" if teacher.startswith("wrn") else last,
    }
    if student in REVIEW:
        methods["reviewkd"] = ce | {"losses.reviewkd.weight": REVIEW[student]}
    if (teacher, student) in STANDARDIZED:
        kd, dkd = STANDARDIZED[teacher, student]
        methods["kd-ls"] = {
            "losses.kd.weight": float(kd[1]),
            "losses.kd.ce_weight": 0.1,
            "losses.kd.temperature": float(kd[0]),
            "losses.kd.standardize": True,
        }
        methods["dkd-ls"] = ce | {
            "losses.dkd.weight": float(dkd[1]),
            "losses.dkd.beta": float(dkd[2]),
            "losses.dkd.temperature": float(dkd[0]),
            "losses.dkd.standardize": True,
        }
    return methods


def _beta(teacher: str, student: str) -> float:
    """mdistiller's weight of the non-target classes, set per pair."""
    if teacher in ("resnet56", "resnet110"):
        return 2.0
    return 6.0 if teacher == "vgg13" or student.startswith("wrn") else 8.0


def _of(cell: Published, entries: Mapping[str, Entry]) -> Entry:
    """The recipe of a cell; a table has the pairs as rows or as columns."""
    pair, method = (cell.column, cell.row) if "/" in cell.column else (cell.row, cell.column)
    teacher, student = (NETWORKS[label] for label in pair.split("/"))
    if method in ("teacher", "student"):
        return entries[f"cifar100/{teacher if method == 'teacher' else student}"]
    method = method.lower().replace("+ls", "-ls")
    return entries[f"cifar100/{teacher}--{student}/{method}"]
