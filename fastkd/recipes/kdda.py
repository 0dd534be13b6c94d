"""Rows of "Understanding the Success of KD: A Data Augmentation Perspective", tables 1-5, 9, 10.

x' is made from x by mixup, CutMix or Cutout, gets its own forward pass, and is only imitated:
0.1 CE(x) + 0.9 [KL(x) + KL(x')], T = 4 (section 3.2). `pick` makes two x' of every image and keeps
the half on which the student is furthest from the teacher. A loss in front (`at+`, `crd+`) sees x
only. `@960` is the number of epochs if it is not the usual one. Tables 6 to 8 count networks; 1 to
5, 9 and 10 are these recipes; figures are left out.

The paper's "CRD" is CRD+KD: all seven values equal that row of the CRD paper. AT and SP in table 5
are without KD, as in the CRD paper, from which they are quoted.

Where the paper is silent, the authors' later released code (Good-DA-in-KD) decides, and
RepDistiller, on which it is based. `:released` follows that code where it contradicts the text.
MobileNets and ShuffleNets train at RepDistiller's 0.01; `-lr0.05` is the same row at the rate that
the text has for all.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastkd.recipes.cifar import CIFAR100, KD, SCHEDULE, auxiliary, student_keys, teacher_keys
from fastkd.recipes.entry import Entry, by_cell
from fastkd.recipes.published import Published, cells

__all__ = ["recipes"]

NETWORKS = {
    "WRN-40-2": "wrn_40_2",
    "WRN-16-2": "wrn_16_2",
    "ResNet20": "resnet20",
    "ResNet56": "resnet56",
    "ResNet110": "resnet110",
    "ResNet8x4": "resnet8x4",
    "ResNet32x4": "resnet32x4",
    "VGG8": "vgg8",
    "VGG13": "vgg13",
    "ResNet50": "resnet50",
    "MobileNetV2": "mobilenetv2_half",
    "ShuffleNetV2": "shufflenetv2",
    "ResNet18": "resnet18",
    "ResNet34": "resnet34",
}
BESIDE_KD = ("AT", "CC", "SP", "PKT", "VID")
METHODS = {
    "KD": "kd",
    "KD+TLmixup": "tlmixup",
    "KD+TLCutMix": "tlcutmix",
    "TLCutMix": "tlcutmix",
    "KD+CutMix": "cutmix",
    "KD+Cutout": "cutout",
    "KD+TLCutMix+pick": "tlcutmix-pick",
    "pick_TS_kld": "tlcutmix-pick",
    "pick_T_ent": "tlcutmix-pick-teacher_entropy",
    "pick_S_ent": "tlcutmix-pick-student_entropy",
    "CRD": "crd+kd",
    "CRD+TLCutMix+pick": "crd+tlcutmix-pick",
    **{loss: f"{loss.lower()}+kd" for loss in BESIDE_KD},
    **{f"{loss}+TLCutMix": f"{loss.lower()}+tlcutmix" for loss in BESIDE_KD},
}

IMAGENET_COLOURS = {"data.mean": [0.485, 0.456, 0.406], "data.std": [0.229, 0.224, 0.225]}
SETTINGS: dict[str, dict[str, Any]] = {
    "cifar100": SCHEDULE | CIFAR100,
    "tiny_imagenet": SCHEDULE
    | {"data.name": "tiny_imagenet", "data.drop_last": False, "augment.padding": 8}
    | IMAGENET_COLOURS,
    "imagenet": {
        "epochs": 100,
        "batch_size": 256,
        "data.name": "folder",
        "data.image_size": 224,
        "data.drop_last": False,
        "augment.crop": "resized",
        "optim.lr": 0.1,
        "optim.momentum": 0.9,
        "optim.weight_decay": 1e-4,
        "optim.milestones": [0.3, 0.6, 0.9],
        "optim.gamma": 0.1,
    }
    | IMAGENET_COLOURS,
}
CODE = "the released code"
REPDISTILLER = "RepDistiller's code"
SOURCES = {
    "data.mean": REPDISTILLER,
    "data.std": REPDISTILLER,
    "data.drop_last": f"{REPDISTILLER}: the partial batch is kept",
    "augment.padding": CODE,
    "augment.crop": CODE,
    "optim.momentum": REPDISTILLER,
    "optim.weight_decay": REPDISTILLER,
    "teacher.lr": "the paper has one rate for all, and none for teachers",
    "teacher.epochs": "not stated for longer runs; one teacher, with the usual schedule, for all",
    "losses.kd.views": f"{CODE}: the KL of x' has full weight, not averaged with the KL of x",
    "losses.at.weight": REPDISTILLER,
    "losses.at.pairs": f"{REPDISTILLER}: every stage",
    "losses.cc.weight": REPDISTILLER,
    "losses.sp.weight": REPDISTILLER,
    "losses.sp.pairs": f"{REPDISTILLER}: the last stage",
    "losses.pkt.weight": REPDISTILLER,
    "losses.vid.weight": REPDISTILLER,
    "losses.vid.pairs": f"{REPDISTILLER}: every stage",
    "losses.crd.weight": REPDISTILLER,
    "losses.crd.pairs": f"{REPDISTILLER}: the pooled features",
    "losses.mixed_ce.weight": "the text has a naive combination, no weight; here the KL's",
    "augment.pick.pool": f"{CODE}: mix_n_run; the text only has how many are picked",
    "augment.pick.update_statistics": f"{CODE}: scoring moves the student's batch norm statistics",
}
FOR_IMAGENET = {
    "optim.weight_decay": "PyTorch's ImageNet example; no script was released",
    "data.drop_last": "not stated; kept as on CIFAR",
    "data.mean": "torchvision's, like the teacher",
    "data.std": "torchvision's, like the teacher",
}
FOR_CUTOUT = {
    "augment.xprime": f"{CODE}: x' beside x, one square for the batch, its side a quarter of theirs"
}
FOR_LIGHT_STUDENTS = {"optim.lr": f"{REPDISTILLER}; the paper has 0.05 for all"}
FOR_AUXILIARY = {
    "losses.kd.weight": "RepDistiller's CRD+KD script: weight 1 with another loss",
    "losses.kd.ce_weight": "RepDistiller's CRD+KD script: weight 1 with another loss",
}


def recipes() -> dict[str, Entry]:
    """Entries of this module by name."""
    entries = by_cell(cells("kdda"), _of)
    for entry in [*entries.values()]:
        if entry.sources.get("optim.lr") == FOR_LIGHT_STUDENTS["optim.lr"]:
            entries[entry.name] = _titled(entry, "RepDistiller's")
            at_text = _at_the_rate_of_the_text(entry)
            entries[at_text.name] = at_text
    for entry in [*entries.values()]:
        for other in _released(entry):
            entries[other.name] = other
    return entries


def _of(cell: Published) -> Entry:
    dataset = {"4": "tiny_imagenet", "5": "imagenet"}.get(cell.table, "cifar100")
    teacher, student = (NETWORKS[label] for label in cell.column.split("/"))
    if cell.row in ("teacher", "student"):
        return _alone(dataset, teacher if cell.row == "teacher" else student)
    match = re.fullmatch(r"(.+?)(?:_(\d+))?", cell.row)
    assert match is not None
    label, epochs = match[1], match[2]
    method = METHODS[label]
    if dataset == "imagenet" and label in BESIDE_KD:
        method = label.lower()
    return _distilled(dataset, teacher, student, method, int(epochs) if epochs else None)


def _at_the_rate_of_the_text(entry: Entry) -> Entry:
    rate = SCHEDULE["optim.lr"]
    sources = {key: source for key, source in entry.sources.items() if key != "optim.lr"}
    faster = replace(
        entry,
        name=f"{entry.name}-lr{rate}",
        keys={**entry.keys, "optim.lr": rate},
        sources=sources,
        published=(),
        note=f"The same row as {entry.name}, which shows the paper's number. {entry.note}".strip(),
    )
    return _titled(faster, "the text's")


def _titled(entry: Entry, whose: str) -> Entry:
    """The entry with its learning rate, and whose it is, in its title."""
    title = f"{entry.description}, at {whose} learning rate {entry.keys['optim.lr']}"
    return replace(entry, description=title)


def _alone(dataset: str, network: str) -> Entry:
    return Entry(
        name=f"kdda/{dataset}/{network}/scratch",
        description=f"{network} on {dataset}, no teacher",
        keys=SETTINGS[dataset] | _student(dataset, network) | {"losses.ce.weight": 1.0},
        sources=_sources(dataset, network),
        mode="paper",
    )


def _distilled(dataset: str, teacher: str, student: str, method: str, epochs: int | None) -> Entry:
    *beside, view = method.split("+")
    keys = SETTINGS[dataset] | _student(dataset, student)
    note = ""
    if dataset == "imagenet":
        keys |= {"teacher.name": f"torchvision:{teacher}", "teacher.pretrained": True}
    else:
        keys |= teacher_keys(teacher, student)
    if dataset == "cifar100":
        note = (
            "The paper's teacher is the checkpoint that RepDistiller released: "
            "teacher.weights=FILE; without it one is trained in the same setting."
        )
    if epochs is not None:
        # The teacher has the usual schedule; its milestones are shares.
        keys |= {"epochs": epochs}
        keys |= {"teacher.epochs": SCHEDULE["epochs"]} if "teacher.train" in keys else {}
    if view.upper() in BESIDE_KD:
        beside, keys = [view], keys | {"losses.ce.weight": 1.0}
    else:
        keys |= KD | _view(view)
        if beside:
            keys |= {"losses.kd.weight": 1.0, "losses.kd.ce_weight": 1.0}
    for loss in beside:
        keys |= auxiliary(loss, student, torchvision=dataset == "imagenet")
    suffix = "" if epochs is None else f"@{epochs}"
    return Entry(
        name=f"kdda/{dataset}/{teacher}--{student}/{method}{suffix}",
        description=f"{teacher} teaches {student} on {dataset} by {method}"
        + ("" if epochs is None else f", {epochs} epochs"),
        keys=keys,
        sources=_sources(dataset, student)
        | (FOR_AUXILIARY if beside else {})
        | (FOR_CUTOUT if view == "cutout" else {}),
        note=note,
        mode="paper",
    )


def _student(dataset: str, student: str) -> dict[str, Any]:
    stem = {"student.stem": "imagenet"} if dataset == "imagenet" else {}
    return student_keys(student) | stem


def _sources(dataset: str, student: str) -> dict[str, str]:
    if dataset == "imagenet":
        return SOURCES | FOR_IMAGENET
    return SOURCES | (FOR_LIGHT_STUDENTS if "optim.lr" in student_keys(student) else {})


def _view(view: str) -> dict[str, Any]:
    """Keys of the second view; the text's formulas."""
    if view == "kd":
        return {}
    both = {"losses.kd.views": ["x", "xprime"]}
    mix, _, picked = view.partition("-")
    if mix == "cutmix":
        return both | {"augment.xprime": "cutmix", "losses.mixed_ce.weight": 0.9}
    keys = both | {"augment.xprime": mix.removeprefix("tl")}
    if picked:
        criterion = picked.removeprefix("pick").removeprefix("-") or "kl"
        # Equation 3; the entropies are of the logits without a temperature.
        keys |= {"augment.pick.temperature": 4.0} if criterion == "kl" else {}
        keys |= {
            "augment.pick.criterion": criterion,
            "augment.pick.pool": 2,
            "augment.pick.share": 0.5,
            "augment.pick.update_statistics": True,
        }
    return keys


def _released(entry: Entry) -> Iterator[Entry]:
    """The entry as the released code runs it, if it differs from the text."""
    keys = dict(entry.keys)
    if "augment.pick.share" in keys and keys["batch_size"] == 64:
        del keys["augment.pick.share"]
        yield entry.in_mode(
            "released",
            keys | {"augment.pick.images": 64},
            "The code picks 64 images of any pool, so that nothing is left out of the partial "
            f"batch at the end of an epoch. {entry.note}",
            {"augment.pick.images": f"{CODE}: a constant; the text has half of the pool"},
        )
    if "losses.mixed_ce.weight" in keys:
        del keys["losses.mixed_ce.weight"]
        yield entry.in_mode(
            "released",
            keys | {"losses.kd.xprime_target": "mixed_logits"},
            "The code's reading of plain CutMix: the student imitates on x' the teacher's logits "
            f"of the two images, mixed like the pixels. {entry.note}",
            {"losses.kd.xprime_target": f"{CODE}, run without its flag for the teacher's labels"},
        )
