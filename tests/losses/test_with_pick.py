"""Every loss beside a picked CutMix view: it trains, and sees of x what it sees without the pick.

Of KD x data augmentation: TLCutMix + pick combines with any loss, which looks at x alone; KL takes
x'. The networks are the smallest that have the stages which the losses look at.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd.compute.ranks import World
from fastkd.losses import KD, BinaryCrossEntropy
from fastkd.losses.base.registry import term_names
from fastkd.output.console import Console
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session, build_stage, open_recipe_data
from fastkd.teachers.loading import load_teacher

WORLD = World(0, 0, 1, torch.device("cpu"), None)
STAGES = {f"stage{k}": f"stage{k}" for k in (1, 2, 3)}
# What a loss must be told besides its weight.
KEYS: dict[str, dict[str, Any]] = {
    **{
        name: {"pairs": STAGES}
        for name in ("ab", "at", "cwd", "fitnet", "fsp", "ft", "mgd", "nst", "vid")
    },
    **{name: {"pairs": {"stage3": "stage3"}} for name in ("sp", "stage_mse")},
    "crd": {"negatives": 8},
    "jointrd": {"stages": list(STAGES)},
    "jointrd:released": {"stages": list(STAGES), "form": "released"},
    "kd": {"ce_weight": 0.1},
}
PICK = {"xprime": "cutmix", "pick": {"criterion": "kl"}}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Equal sums, whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def first_step(case: str, *, picked: bool) -> dict[str, float]:
    """What the trainer of a recipe reports of its first step, per image of a batch of 8."""
    name = case.partition(":")[0]
    kd = {"weight": 0.9, "ce_weight": 0.0, "views": ["x", "xprime"] if picked else ["x"]}
    losses = {"kd": kd, name: {"weight": 0.5, **KEYS.get(case, {})}}
    if name == "kd":
        losses["kd"] = kd | KEYS["kd"]
    recipe = load_recipe(
        None,
        values={
            **{"name": "test", "epochs": 1, "batch_size": 8, "compile": "off", "precision": "fp32"},
            "data": {"name": "synthetic", "train_limit": 40, "image_size": 8},
            "student": {"name": "resnet8", "width": 0.25},
            "teacher": {"name": "resnet8", "width": 0.25, "train": True},
            "augment": PICK if picked else {},
            "losses": losses,
        },
    )
    session = Session(WORLD, Console(enabled=False), Path("unused"))
    data = open_recipe_data(recipe, session)
    assert recipe.teacher is not None
    torch.manual_seed(3)
    teacher = load_teacher(recipe.teacher, data)
    assert teacher is not None
    trainer = build_stage(recipe, data, teacher, session)
    trainer.runner.train()
    before = [parameter.clone() for parameter in trainer.step.parameters()]
    trainer.optimize(next(trainer.prepare(0)), 0, 0)
    assert trainer.guard.counts()[1] == 0
    moved = [(p != old).any() for p, old in zip(trainer.step.parameters(), before, strict=True)]
    assert all(moved)
    values = dict(zip(trainer.metric_names, trainer.totals_M.tolist(), strict=True))
    assert values["images"] == 8
    return {key: value / 8 for key, value in values.items()}


@pytest.mark.parametrize("case", [*(n for n in term_names() if n != "bce"), "jointrd:released"])
def test_any_loss_beside_a_pick(case: str) -> None:
    found = first_step(case, picked=True)
    assert found["pick_ratio"] > 1
    assert found["kd_xprime"] > 0
    own = {part: value for part, value in found.items() if part.startswith(case.partition(":")[0])}
    assert own
    assert all(math.isfinite(value) and value > 0 for value in own.values())
    if case != "mixed_ce":  # whose x' there is not
        alone = first_step(case, picked=False)
        shared = own.keys() & alone.keys()
        assert shared
        for part in shared:
            assert found[part] == pytest.approx(alone[part], rel=1e-6), part


def test_several_labels_beside_a_pick() -> None:
    images_NCHW = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels_NC = (images_NCHW.mean((2, 3)) > 0).float()
    loader = DataLoader(TensorDataset(images_NCHW, labels_NC), batch_size=8)

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        pooled = [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*pooled, nn.Linear(4, 3))

    result = fastkd.distill(
        network(1),
        network(2),
        loader,
        loader,
        epochs=1,
        losses=[KD(ce_weight=0, views=("x", "xprime")), BinaryCrossEntropy()],
        xprime="cutmix",
        pick="kl",
        **{"device": "cpu", "compile": "off", "precision": "fp32", "quiet": True},
    )
    (row,) = result.metrics["history"]
    assert row["pick_ratio"] > 1
    assert row["train_bce"] > 0
