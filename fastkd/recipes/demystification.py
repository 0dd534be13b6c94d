"""Rows of "On the Demystification of Knowledge Distillation: A Residual Network Perspective"
(arXiv:2006.16589), tables 1 to 6, CIFAR-100.

A residual teacher (R) teaches the same network without shortcuts (NR). All convolutions are
grouped: `gK` is K groups, `GK` K channels per group. `scratch` are the two baselines of each
column: `wrn_22_2-R-g8/scratch`, `wrn_22_2-NR-g8/scratch`. No code was released, and the copy of
the paper we had lacks nearly all numbers of section 5. The values here are from the code of
Teacher-free KD (arXiv:1909.11723), which has the same MobileNet-V2: a hint, not evidence.
"""

import re
from typing import Any

from fastkd.recipes.entry import Entry, by_cell
from fastkd.recipes.published import Published, cells, papers

__all__ = ["recipes"]

NETWORKS = {
    "ResNet-18": "resnet18",
    "MobileNet-V2": "mobilenetv2",
    "WRN-22x2": "wrn_22_2",
    "WRN-22x10": "wrn_22_10",
    "WRN-28x2": "wrn_28_2",
    "WRN-40x2": "wrn_40_2",
}
SETTING: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 128,
    "data.name": "cifar100",
    "data.mean": [0.5071, 0.4867, 0.4408],
    "data.std": [0.2675, 0.2565, 0.2761],
    "data.drop_last": False,
    "augment.padding": 4,
    "augment.pad_mode": "reflect",
    "optim.lr": 0.1,
    "optim.momentum": 0.9,
    "optim.weight_decay": 5e-4,
    "optim.warmup_epochs": 0,
}
STEPS: dict[str, Any] = {"optim.milestones": [60, 120, 160], "optim.gamma": 0.2}
EVERY_EPOCH: dict[str, Any] = {"optim.schedule": "exponential", "optim.gamma": 0.98}

LEAD = "not stated in our copy; from Teacher-free KD's code, only a hint"
SOURCES = {
    "epochs": LEAD,
    "teacher.epochs": LEAD,
    "data.mean": "not stated",
    "data.std": "not stated",
    "data.drop_last": "not stated",
    "augment.padding": "not stated in our copy; 4 is the convention of these networks",
    "optim.lr": LEAD,
    "optim.momentum": LEAD,
    "optim.weight_decay": LEAD,
    "optim.warmup_epochs": "no warm-up in our copy; Teacher-free KD's code has one epoch of it",
    "optim.milestones": f"{LEAD}; the paper has three drops",
    "losses.kd.weight": f"{LEAD}: alpha 0.6 (there of ResNet-18), for MobileNet-V2 0.95, "
    "divided by the 100 classes",
    "losses.kd.ce_weight": f"{LEAD}: 1 - alpha",
    "losses.kd.temperature": LEAD,
}


STEPPED = "the text has one factor for ResNet-18 and another for the WRNs, both lost in our copy"
GAMMAS = {
    "mobilenetv2": "not stated in our copy; from MobileNet-V2's own paper, after every epoch",
    "resnet18": f"{LEAD}; {STEPPED}: here that of the WRNs",
}
STEP_NOTE = f"The learning rate drops by 0.2: {STEPPED}."


def recipes() -> dict[str, Entry]:
    """Entries of this module by name."""
    return by_cell(cells("demystification"), _of)


def _of(cell: Published) -> Entry:
    """Rows are teachers, or one of two baselines; columns are students."""
    network = NETWORKS[papers()["demystification"]["tables"][cell.table]["network"]]
    student = cell.column
    if cell.row == "Baseline":
        return _alone(network, student.replace("NR", "R"))
    if cell.row == "NR-baseline":
        return _alone(network, student)
    alpha = 0.95 if network == "mobilenetv2" else 0.6
    keys = _setting(network) | _network("student", network, student)
    keys |= _network("teacher", network, cell.row) | {"teacher.train": True}
    if network == "mobilenetv2":
        keys |= {"epochs": 300, "teacher.epochs": 200}
    keys |= {
        "losses.kd.weight": alpha / 100,
        "losses.kd.ce_weight": round(1 - alpha, 2),
        "losses.kd.temperature": 20.0,
    }
    sources = _sources(network)
    if network == "mobilenetv2":
        del sources["epochs"]  # the only number that the text states
    return Entry(
        name=f"demystification/cifar100/{network}-{cell.row}--{student}/kd",
        description=f"{network}: {cell.row} teaches {student} on cifar100",
        keys=keys,
        sources=sources,
        note=_note(network),
        mode="paper",
    )


def _alone(network: str, version: str) -> Entry:
    return Entry(
        name=f"demystification/cifar100/{network}-{version}/scratch",
        description=f"{network} {version} on cifar100, no teacher",
        keys=_setting(network) | _network("student", network, version) | {"losses.ce.weight": 1.0},
        sources=_sources(network),
        note=_note(network),
        mode="paper",
    )


def _sources(network: str) -> dict[str, str]:
    return SOURCES | {"optim.gamma": GAMMAS.get(network, f"{LEAD}; {STEPPED}")}


def _note(network: str) -> str:
    return "" if network == "mobilenetv2" else STEP_NOTE


def _setting(network: str) -> dict[str, Any]:
    return SETTING | (EVERY_EPOCH if network == "mobilenetv2" else STEPS)


def _network(role: str, network: str, version: str) -> dict[str, Any]:
    """`NR-g8` -> keys of student or teacher."""
    match = re.fullmatch(r"(R|NR)-([gG])(\d+)", version)
    assert match is not None
    number = match[3]
    wide = {"1": "G(N)"}.get(number, f"G(N/{number})")
    keys: dict[str, Any] = {
        f"{role}.name": network,
        f"{role}.block": f"G({number})" if match[2] == "g" else wide,
    }
    if match[1] == "NR":
        keys[f"{role}.shortcuts"] = False
    if network.startswith("wrn"):
        keys[f"{role}.dropout"] = 0.3
    return keys
