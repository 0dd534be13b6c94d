"""Whole training steps of TLCutMix and of TLCutMix + pick, beside plain KD; batch 64 at 32 px.

    pytest benchmarks/bench_pick.py [--pairs 20] [-k wrn] [--save-results]

All pairs of the data augmentation paper's arithmetic on CIFAR-100 in the default precision without
the compiler; the first pair also in fp32, and compiled as in a long run. The sides share weights
and batch. Beside each ratio of times is the ratio of multiply-accumulates (forward 1, backward 2,
the pool's teacher logits used again: `fastkd.testing.step_macs`).

Checked before the clock starts: all sides have the loss of the formula on x, and pick imitates what
the formula chooses from the same pool.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastkd import count, create_model
from fastkd.augment.config import PickConfig
from fastkd.compute.placement import Placement
from fastkd.compute.precision import resolve_precision
from fastkd.compute.ranks import World
from fastkd.data.facts import Facts
from fastkd.data.loaders.foreign import ForeignLoader
from fastkd.losses import KD
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.teaching import Teaching
from fastkd.testing import assert_mean_as_accurate, eager_step_rows, step_macs
from fastkd.training.build import build_trainer
from fastkd.training.config import OptimConfig
from fastkd.training.progress import Plan
from fastkd.training.settings import Output, TrainData, TrainingSettings
from fastkd.training.trainer import Trainer

BATCH, CLASSES, SIDE = 64, 100, 32
WORLD = World(0, 0, 1, torch.device("cpu"), None)
PAIRS = (
    "wrn_40_2--wrn_16_2",
    "resnet56--resnet20",
    "resnet110--resnet20",
    "resnet32x4--resnet8x4",
    "vgg13--vgg8",
    "vgg13--mobilenetv2_half",
    "resnet50--vgg8",
    "resnet32x4--shufflenetv2",
)
# Pair, precision, compiled.
CASES = [
    (PAIRS[0], "auto", True),
    (PAIRS[0], "fp32", False),
    *((pair, "auto", False) for pair in PAIRS),
]
SIDES = ("kd", "tlcutmix", "pick")


def trainer_of(
    side: str, student: nn.Module, teacher: nn.Module, placement: Placement, compiled: bool
) -> Trainer:
    """A trainer on one batch, which every epoch repeats."""
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(0, CLASSES, (BATCH,))
    loader = ForeignLoader([(images, labels)], placement, seed=0)
    facts = Facts((3, SIDE, SIDE), CLASSES, labels, "class", ((0.0,) * 3, (1.0,) * 3))
    return build_trainer(
        Plan(stage="bench", digest="", seed=0, epochs=1),
        student=copy.deepcopy(student),
        teaching=Teaching((LoadedNet(copy.deepcopy(teacher)),)),
        terms=[KD(views=("x",) if side == "kd" else ("x", "xprime"))],
        data=TrainData(loader, loader, facts, images=BATCH),
        settings=TrainingSettings(
            optim=OptimConfig(schedule="constant", lr=0.01),
            xprime="none" if side == "kd" else "cutmix",
            pick=PickConfig() if side == "pick" else None,
            compile="on" if compiled else "off",
        ),
        placement=placement,
        output=Output(),
    )


def step_of(trainer: Trainer) -> Callable[[], None]:
    """Everything the loop does for a batch: loader, views, teacher, pick, step, guard, metrics."""
    trainer.runner.train()

    def step() -> None:
        for prepared in trainer.prepare(0):
            trainer.optimize(prepared, 0, 0)

    return step


def first_step(trainer: Trainer) -> dict[str, float]:
    """Means over the batch of its very first step, before any weight has moved."""
    step_of(trainer)()
    values = dict(zip(trainer.metric_names, trainer.totals_M.tolist(), strict=True))
    return {name: value / values["images"] for name, value in values.items()}


def check(trainers: dict[str, Trainer], student: nn.Module, teacher: nn.Module) -> None:
    """The checks of the module's docstring: what a first step reports against the formula."""
    pick = trainers["pick"]
    batch = next(pick.loader.epoch(0))
    views = pick.views(batch, 0, 0)
    pool = views["xprime"]
    assert len(pool) == 2 * BATCH
    first = {side: first_step(trainer) for side, trainer in trainers.items()}

    dtypes = (pick.precision.dtype, torch.float64)
    nets = student, teacher
    eager, truth = (eager_step_rows(*nets, views["x"], batch.labels_N, dtype) for dtype in dtypes)
    for side, found in first.items():
        for part, eager_N, truth_N in zip(("kd", "ce"), eager, truth, strict=True):
            assert_mean_as_accurate(f"{side}, {part}", found[part], eager_N, truth_N)

    eager_P, truth_P = (eager_step_rows(*nets, pool, None, dtype)[0] for dtype in dtypes)
    hardest = truth_P.sort(descending=True).indices[: len(pool) // 2]
    # r of the paper's equation 4.
    eager_r, truth_r = (scores[hardest] / scores.mean() for scores in (eager_P, truth_P))
    assert truth_r.mean() > 1
    assert_mean_as_accurate("pick_ratio", first["pick"]["pick_ratio"], eager_r, truth_r)
    eager_K, truth_K = (eager_step_rows(*nets, pool[hardest], None, dtype)[0] for dtype in dtypes)
    assert_mean_as_accurate("kd_xprime", first["pick"]["kd_xprime"], eager_K, truth_K)


@pytest.mark.parametrize(
    ("pair", "precision", "compiled"),
    CASES,
    ids=[f"{pair}, {p}, {'compiled' if c else 'eager'}" for pair, p, c in CASES],
)
def bench_pick(pair: str, precision: str, compiled: bool, table, race) -> None:
    torch.manual_seed(1)
    teacher, student = (create_model(name, CLASSES) for name in pair.split("--"))
    placement = Placement(WORLD, resolve_precision(precision, WORLD.device))
    trainers = {side: trainer_of(side, student, teacher, placement, compiled) for side in SIDES}
    check(trainers, student, teacher)
    found = race({side: step_of(trainer) for side, trainer in trainers.items()}, of="kd")
    assert all(trainer.guard.counts() == (0, 0) for trainer in trainers.values())
    of_student, of_teacher = (count(net, (3, SIDE, SIDE)).macs for net in (student, teacher))
    macs = {side: step_macs(of_student, of_teacher, side) for side in SIDES}
    for over, of in (("tlcutmix", "kd"), ("pick", "kd"), ("pick", "tlcutmix")):
        ratio, arithmetic = found.ratio(over, of), macs[over] / macs[of]
        table.rows.append(
            {
                "pair": pair,
                "how": f"{placement.precision.name}, {'compiled' if compiled else 'eager'}",
                "ratio": f"{over} / {of}",
                "ms": found.ms(over),
                "time": ratio.median,
                "p10": ratio.p10,
                "p90": ratio.p90,
                "arithmetic": arithmetic,
                "time / arithmetic": ratio.median / arithmetic,
            }
        )
