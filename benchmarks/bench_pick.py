"""Whole training steps of TLCutMix and of TLCutMix + pick, beside plain KD; batch 64 at 32 px.

    pytest benchmarks/bench_pick.py [--pairs 20] [-k wrn] [--save-results]

All pairs of the data augmentation paper's arithmetic on CIFAR-100 in the default precision without
the compiler; the first pair also in fp32, and compiled as a long run has it. The sides
share weights and batch, and alternate in one process. Beside each ratio of times stands that of
multiply-accumulates (forward 1, backward 2, the pool's teacher logits used again:
`testing.step_macs`, held against a count of a real step in tests/training/test_step_cost.py).

The gate, before the clock: all sides have the same loss on x, and what pick imitates is what the
formula in fp32 chooses from the same pool.
"""

import copy
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastkd import count, create_model
from fastkd.augment.config import PickConfig
from fastkd.compute.placement import Placement
from fastkd.compute.precision import resolve_precision
from fastkd.compute.ranks import World
from fastkd.data.facts import Facts
from fastkd.data.loaders.foreign import ForeignLoader
from fastkd.losses import KD
from fastkd.teachers.ensemble import LoadedNet
from fastkd.testing import interleave, step_macs
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
    """On one batch, which every epoch repeats."""
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(0, CLASSES, (BATCH,))
    loader = ForeignLoader([(images, labels)], WORLD, 0, True)
    facts = Facts((3, SIDE, SIDE), CLASSES, labels, False, ((0.0,) * 3, (1.0,) * 3))
    return build_trainer(
        Plan(stage="bench", digest="", seed=0, epochs=1),
        student=copy.deepcopy(student),
        teachers=(LoadedNet(copy.deepcopy(teacher)),),
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
        # The host must have seen the result: a CPU is done anyway, a GPU is waited for.
        trainer.totals_M.sum().item()

    return step


def first_step(trainer: Trainer) -> dict[str, float]:
    """Means over the batch of its very first step, before any weight has moved."""
    step_of(trainer)()
    values = dict(zip(trainer.metric_names, trainer.totals_M.tolist(), strict=True))
    return {name: value / values["images"] for name, value in values.items()}


@torch.no_grad()
def chosen_by_formula(pool: Tensor, student: nn.Module, teacher: nn.Module) -> tuple[float, float]:
    """r of the paper's equation 4, and the KL of the student on what is chosen, in eager fp32."""

    def divergence(images: Tensor) -> Tensor:
        q, p = (net(images).div(4).log_softmax(1) for net in (teacher, student))
        return (q.exp() * (q - p)).sum(1)

    student, teacher = copy.deepcopy(student).train(), teacher.eval()
    scores = divergence(pool)
    hardest = scores.sort(descending=True).indices[: len(pool) // 2]
    ratio = scores[hardest].mean() / scores.mean()
    return ratio.item(), 16 * divergence(pool[hardest]).mean().item()


def check(trainers: dict[str, Trainer], student: nn.Module, teacher: nn.Module) -> None:
    """The gate of the module's docstring."""
    pick = trainers["pick"]
    pool = pick.views(next(pick.loader.epoch(0)), 0, 0)["xprime"].float()
    assert len(pool) == 2 * BATCH
    first = {side: first_step(trainer) for side, trainer in trainers.items()}
    tolerance = 1e-4 if pick.precision.name == "fp32" else 3e-2
    for side in SIDES:
        for part in ("ce", "kd"):
            assert first[side][part] == pytest.approx(first["kd"][part], rel=tolerance), side
    ratio, loss = chosen_by_formula(pool, student, teacher)
    assert ratio > 1
    assert first["pick"]["pick_ratio"] == pytest.approx(ratio, rel=tolerance)
    assert first["pick"]["kd_xprime"] == pytest.approx(loss, rel=2 * tolerance)


@pytest.mark.parametrize(
    ("pair", "precision", "compiled"),
    CASES,
    ids=[f"{pair}, {p}, {'compiled' if c else 'eager'}" for pair, p, c in CASES],
)
def bench_pick(
    pair: str, precision: str, compiled: bool, table, benchmark, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(1)
    teacher, student = (create_model(name, CLASSES) for name in pair.split("--"))
    placement = Placement(WORLD, resolve_precision(precision, WORLD.device))
    trainers = {side: trainer_of(side, student, teacher, placement, compiled) for side in SIDES}
    check(trainers, student, teacher)
    steps = {side: step_of(trainer) for side, trainer in trainers.items()}
    seconds = interleave(steps, request.config.getoption("--pairs"))
    assert all(trainer.guard.counts() == (0, 0) for trainer in trainers.values())
    of_student, of_teacher = (count(net, (3, SIDE, SIDE)).macs for net in (student, teacher))
    macs = {side: step_macs(of_student, of_teacher, side) for side in SIDES}
    how = f"{placement.precision.name}, {'compiled' if compiled else 'eager'}"
    for over, of in (("tlcutmix", "kd"), ("pick", "kd"), ("pick", "tlcutmix")):
        ratios = sorted(a / b for a, b in zip(seconds[over], seconds[of], strict=True))
        median = statistics.median(ratios)
        table.rows.append(
            {
                "pair": pair,
                "how": how,
                "ratio": f"{over} / {of}",
                "ms": 1e3 * statistics.median(seconds[over]),
                "time": median,
                "p10": ratios[len(ratios) // 10],
                "p90": ratios[-1 - len(ratios) // 10],
                "arithmetic": macs[over] / macs[of],
                "time / arithmetic": median / (macs[over] / macs[of]),
            }
        )
    benchmark.pedantic(steps["pick"], rounds=1)
