"""CIFAR recipes as in RepDistiller: 240 epochs, batch 64, lr 0.05, T 4, 0.1 CE + 0.9 KD.

Source: "Contrastive Representation Distillation" (arXiv:1910.10699) and its released code; the
pairs are those of the paper's table 1 whose networks the zoo has. The teacher is trained first
with the same schedule unless teacher.weights names a checkpoint.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from fastkd.recipe.schema import Recipe

__all__ = ["RECIPES"]

PAIRS = (
    ("wrn_40_2", "wrn_16_2"),
    ("wrn_40_2", "wrn_40_1"),
    ("resnet56", "resnet20"),
    ("resnet110", "resnet20"),
    ("resnet110", "resnet32"),
    ("resnet32x4", "resnet8x4"),
)

METHODS: dict[str, dict[str, Any]] = {
    "kd": {
        "losses": {"kd": {"weight": 0.9, "ce_weight": 0.1, "temperature": 4.0}},
    },
    "at": {
        "losses": {
            "ce": {"weight": 1.0},
            "at": {"weight": 1000.0, "pairs": {f"stage{i}": f"stage{i}" for i in (1, 2, 3)}},
        },
    },
    "tlcutmix": {
        "losses": {
            "kd": {"weight": 0.9, "ce_weight": 0.1, "temperature": 4.0, "views": ["x", "xprime"]}
        },
        "augment": {"xprime": "cutmix"},
    },
    "tlmixup": {
        "losses": {
            "kd": {"weight": 0.9, "ce_weight": 0.1, "temperature": 4.0, "views": ["x", "xprime"]}
        },
        "augment": {"xprime": "mixup"},
    },
}


def distil(dataset: str, teacher: str, student: str, method: str) -> Recipe:
    """One pair, one method."""
    return Recipe.model_validate(
        {
            "name": f"{dataset}/{teacher}--{student}/{method}",
            "description": f"{teacher} teaches {student} on {dataset} by {method}",
            "data": {"name": dataset},
            "student": {"name": student},
            "teacher": {"name": teacher, "train": True},
            **METHODS[method],
        }
    )


def alone(dataset: str, student: str) -> Recipe:
    """A network trained on the labels only."""
    return Recipe.model_validate(
        {
            "name": f"{dataset}/{student}",
            "description": f"{student} on {dataset}, no teacher",
            "data": {"name": dataset},
            "student": {"name": student},
            "losses": {"ce": {"weight": 1.0}},
        }
    )


def _recipes() -> dict[str, Callable[[], Recipe]]:
    recipes: dict[str, Callable[[], Recipe]] = {}
    for dataset in ("cifar10", "cifar100"):
        for student in dict.fromkeys(net for pair in PAIRS for net in pair):
            recipes[f"{dataset}/{student}"] = partial(alone, dataset, student)
        for teacher, student in PAIRS:
            for method in METHODS:
                name = f"{dataset}/{teacher}--{student}/{method}"
                recipes[name] = partial(distil, dataset, teacher, student, method)
    return recipes


RECIPES = _recipes()
