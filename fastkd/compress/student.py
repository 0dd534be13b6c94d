"""A student by what `create_model` builds: its name and options, for files, runs and messages."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastkd.models import create_model
from fastkd.models.registry import list_models, model_options
from fastkd.models.zoo.families import family_of
from fastkd.storage.weight_file import WeightFile
from fastkd.storage.weights import save_weights

__all__ = ["Student", "narrower", "start_weights"]


@dataclass(frozen=True)
class Student:
    """A network to be trained."""

    name: str
    options: Mapping[str, Any]
    label: str
    """What differs from the network of this name; may be empty."""

    @property
    def title(self) -> str:
        """For tables and messages."""
        return f"{self.name}, {self.label}" if self.label else self.name

    @property
    def digest(self) -> str:
        """Eight hex digits of name and options."""
        text = json.dumps([self.name, dict(self.options)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def build(self, num_classes: int) -> nn.Module:
        """With new weights."""
        return create_model(self.name, num_classes, kernels="plain", **self.options)

    def plain(self) -> dict[str, Any]:
        """For JSON; `of_plain` reads it. `id` tells apart what has one label."""
        return {
            "name": self.name,
            "options": dict(self.options),
            "label": self.label,
            "id": self.digest,
        }

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> "Student":
        """What `plain` has written; further entries do not matter."""
        return cls(plain["name"], plain["options"], plain["label"])


def start_weights(student: Student, num_classes: int, source: Path, target: Path) -> str:
    """Write the student's first weights: those of another network that fit by name and shape.

    The rest is drawn from torch's generator. Returns how many tensors were taken.
    """
    model = student.build(num_classes)
    given, own = WeightFile.open(source).tensors, model.state_dict()
    shared = own.keys() & given.keys()
    fitting = {key: given[key] for key in shared if given[key].shape == own[key].shape}
    model.load_state_dict(fitting, strict=False)
    save_weights(target, model)
    return f"{len(fitting)} of {len(own)} tensors"


def narrower(name: str, options: Mapping[str, Any]) -> list[Student]:
    """The same network with fewer channels, the widest first; empty if there is no such.

    Networks of the zoo with an option `width` in sixteenths of the given one, wide residual
    networks by name (wrn_40_2, wrn_40_1), networks of timm that have their width in the name
    (mobilenetv2_100, _050, _035).
    """
    if match := re.fullmatch(r"(wrn_\d+_)(\d+)", name):
        names = [f"{match[1]}{width}" for width in range(int(match[2]) - 1, 0, -1)]
        return [Student(one, dict(options), "") for one in names]
    if match := re.fullmatch(r"timm:(\w+?_)(\d{3})", name):
        alike = list_models(f"timm:{match[1]}[0-9][0-9][0-9]")
        widths = sorted({one[-3:] for one in alike if one[-3:] < match[2]}, reverse=True)
        names = [f"timm:{match[1]}{width}" for width in widths]
        return [Student(one, dict(options), "") for one in names]
    if family_of(name) is None or "width" not in (model_options(name) or ()):
        return []
    full = float(options.get("width", 1.0))
    widths = [full * n / 16 for n in range(15, 0, -1)]
    return [Student(name, {**options, "width": w}, f"width {w:g}") for w in widths]
