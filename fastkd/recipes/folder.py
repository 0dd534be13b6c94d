"""The recipe to start from with images of your own: `fastkd train folder data.root=photos`.

A teacher of your own (`teacher.name`, `teacher.weights`) teaches the student; without one, a
ResNet-34 is trained on the same images first. Nothing is downloaded. The optimizer follows from the
student, see `optimizer`.
"""

import re
from collections.abc import Mapping
from typing import Any

from fastkd.recipes.entry import Entry

__all__ = ["optimizer", "recipes"]

_LIKE_SGD = re.compile(r"resnet|resnext|seresnet|wide_resnet|wrn|plain|vgg")

_PRESETS: dict[str, dict[str, Any]] = {
    "sgd": {"nesterov": True, "weight_decay": 5e-4, "decay_norms": True},
    "adamw": {"nesterov": False, "weight_decay": 0.05, "decay_norms": False},
}
_RATES = {"sgd": 0.05, "adamw": 1e-3}

RULE = """\
The optimizer follows from the student, unless you set its keys:
  optim.name           sgd for names that begin with resnet, resnext, seresnet, wide_resnet, wrn,
                       plain or vgg; adamw for all others (mobile networks, transformers, ..)
  optim.lr             sgd 0.05, adamw 0.001; a tenth of it for a student with trained weights
                       (student.pretrained or student.weights)
  teacher.lr           the same for the teacher, if it is trained here
  optim.weight_decay   sgd 0.0005, adamw 0.05 and none on norms and biases
  optim.warmup_epochs  5, at most a tenth of epochs
A teacher of your own: teacher.name=NAME teacher.weights=FILE. One that is fine-tuned first, from
published weights: teacher.pretrained=true teacher.new_head=true. No teacher, the labels alone:
teacher=null losses.kd=null losses.ce.weight=1."""


def optimizer(values: Mapping[str, Any], given: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The optimizer's keys for the student and teacher in nested recipe values; `RULE` in code.

    given: dotted keys that the user has set, of which optim.name decides about the others.
    """
    student, teacher = _section(values, "student"), _section(values, "teacher")
    name = _section(values, "optim").get("name") if "optim.name" in given else None
    if name not in _PRESETS:
        own = str(student.get("name")).rpartition(":")[2]
        name = "sgd" if _LIKE_SGD.match(own) else "adamw"
    epochs = values.get("epochs")
    warmup = min(5.0, epochs / 10) if isinstance(epochs, int) and epochs > 0 else 0.0
    keys = {
        "name": name,
        "lr": _rate(name, student),
        **_PRESETS[name],
        "schedule": "cosine",
        "warmup_epochs": warmup,
    }
    found = {f"optim.{key}": value for key, value in keys.items()}
    return found | ({"teacher.lr": _rate(name, teacher)} if teacher else {})


def recipes() -> dict[str, Entry]:
    """A small MobileNetV3, taught by a ResNet-34 or by a teacher of your own."""
    keys: dict[str, Any] = {
        "epochs": 100,
        "batch_size": 64,
        "data.name": "folder",
        "data.image_size": 224,
        "augment.crop": "resized",
        "student.name": "timm:mobilenetv3_small_100",
        "teacher.name": "torchvision:resnet34",
        "teacher.train": True,
        "losses.kd.weight": 0.9,
        "losses.kd.ce_weight": 0.1,
        "losses.kd.temperature": 4.0,
    }
    networks = {role: {"name": keys[f"{role}.name"]} for role in ("student", "teacher")}
    keys |= optimizer({"epochs": keys["epochs"], **networks})
    entry = Entry(
        name="folder",
        description="a folder of your own images: any teacher -> any student",
        keys=keys,
        note=RULE,
        follow=optimizer,
    )
    return {entry.name: entry}


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    # Not validated yet: whatever a file or an override holds.
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _rate(optimizer: str, network: Mapping[str, Any]) -> float:
    trained = network.get("pretrained") is True or network.get("weights") is not None
    return _RATES[optimizer] / 10 if trained else _RATES[optimizer]
