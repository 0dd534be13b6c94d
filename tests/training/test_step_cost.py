"""What a step computes: every convolution and product of a real step, counted, against the paper's
arithmetic, and that arithmetic on the paper's pairs against its oracle.
"""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastkd.runs.stages
from fastkd.compute.ranks import World
from fastkd.models import count, create_model
from fastkd.output.console import Console
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session, open_recipe_data
from fastkd.teachers.loading import load_teacher
from fastkd.testing import step_macs

ORACLE = json.loads((Path(__file__).parent / "step_cost_oracle.json").read_text())["per_pair"]
SETS = {"cifar100": (100, 32), "tinyimagenet": (200, 64)}
NAMES = {"MobileNetV2": "mobilenetv2_half", "ShuffleV2": "shufflenetv2", "ResNet50": "resnet50"}
KEYS = {
    "kd": ("losses.kd.views=x", "augment.xprime=none"),
    "tlcutmix": (),
    "pick": ("augment.pick.criterion=kl",),
    "pick_teacher_entropy": ("augment.pick.criterion=teacher_entropy",),
}
BATCH = 8


def macs(name: str, dataset: str) -> int:
    classes, side = SETS[dataset]
    return count(create_model(NAMES.get(name, name), classes), (3, side, side)).macs


@pytest.mark.parametrize("pair", ORACLE)
def test_the_arithmetic_of_the_papers_pairs(pair: str) -> None:
    dataset, names = pair.split("/")
    teacher, student = (macs(name, dataset) for name in names.split("->"))
    cost = {method: step_macs(student, teacher, method) for method in KEYS}
    found = {
        "tlcutmix": cost["tlcutmix"] / cost["kd"],
        "pick_kld_reuse_teacher_logits": cost["pick"] / cost["kd"],
        "pick_tent_reuse": cost["pick_teacher_entropy"] / cost["kd"],
        "pick_kld_reuse_over_tlcutmix": cost["pick"] / cost["tlcutmix"],
    }
    assert found == pytest.approx(ORACLE[pair], abs=6e-4)


@pytest.mark.parametrize("method", KEYS)
def test_a_step_computes_what_the_arithmetic_says(method: str) -> None:
    recipe = load_recipe(
        "quickstart",
        overrides=[
            "data.name=synthetic",
            "data.train_limit=64",
            f"batch_size={BATCH}",
            "compile=off",
            "precision=fp32",
            "student.name=wrn_10_1",
            "teacher.name=resnet20",
            "teacher.width=null",
            "student.width=null",
            "augment.xprime=cutmix",
            "losses.kd.views=x,xprime",
            *KEYS[method],
        ],
    )
    world = World(0, 0, 1, torch.device("cpu"), None)
    session = Session(world, Console(enabled=False), Path("unused"))
    data = open_recipe_data(recipe, session)
    teacher = load_teacher(recipe.teacher, data)
    assert teacher is not None
    trainer = fastkd.runs.stages.build_stage(recipe, data, teacher, session)
    trainer.runner.train()
    with FlopCounterMode(display=False) as counter:
        trainer.optimize(next(trainer.prepare(0)), 0, 0)
    shape = data.facts.image_shape
    of_student, of_teacher = (
        count(create_model(name, 10), shape).macs for name in ("wrn_10_1", "resnet20")
    )
    # Nobody wants the gradient of the images: the stem's backward pass is one product, not two.
    backward_passes = 1 if method == "kd" else 2
    stem = backward_passes * 3 * 9 * 16 * shape[1] ** 2
    expected = step_macs(of_student, of_teacher, method) - stem
    assert counter.get_total_flops() == 2 * BATCH * expected
