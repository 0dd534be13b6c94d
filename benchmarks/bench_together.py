"""Training steps of several students on one teacher beside one student alone; batch 64 at 32 px.

    pytest benchmarks/bench_together.py [--pairs 20] [-k seeds] [--save-results]

ResNet32x4 -> ResNet8x4 on random images of CIFAR's size, 100 classes: three seeds of weights that
share their images (`data.seed`), and four losses on logits. A sample is one step: of all students
by the batches that they share, and of the first student with a teacher of its own. Beside the ratio
of times is that of multiply-accumulates, (teacher + N * 3 students) / (teacher + 3 students), the
same of measured times, with that of the student without a teacher, which a perfect sharing has, and
what is saved against N such runs one after another.

Checked before the clock starts: after three steps, the third in another epoch, every student that
shared has the weights that it has alone, bit for bit.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import count as forever

import numpy as np
import pytest
import torch
from torch import nn

from fastkd import count, create_model
from fastkd.compute.placement import Placement
from fastkd.compute.precision import resolve_precision
from fastkd.compute.ranks import World
from fastkd.data import ImageSet, Loading, ResidentLoader
from fastkd.data.facts import Facts
from fastkd.data.geometry import Geometry
from fastkd.losses import DIST, DKD, KD, CrossEntropy, SoftCE
from fastkd.losses.base.term import LossTerm
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.teaching import Teaching
from fastkd.testing import step_macs
from fastkd.training.ahead import run_ahead
from fastkd.training.build import build_trainer
from fastkd.training.config import OptimConfig
from fastkd.training.progress import Plan
from fastkd.training.settings import Output, TrainData, TrainingSettings
from fastkd.training.sharing import SharedBatches
from fastkd.training.step import Prepared
from fastkd.training.trainer import Trainer

BATCH, CLASSES, SIDE, IMAGES = 64, 100, 32, 128
NORMALIZATION = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
WORLD = World(0, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"), None)

Student = tuple[int, Callable[[], list[LossTerm]]]
"""Seed of its weights, its losses."""
GROUPS: dict[str, list[Student]] = {
    "three seeds": [(seed, lambda: [KD()]) for seed in range(3)],
    "four losses": [
        (0, lambda: [KD()]),
        (0, lambda: [DKD(), CrossEntropy()]),
        (0, lambda: [DIST(), CrossEntropy()]),
        (0, lambda: [SoftCE(), CrossEntropy()]),
    ],
}
# Precision, compiled; on a machine that computes in fp32 only there are two.
DEFAULT = resolve_precision("auto", WORLD.device).name
HOW = list(dict.fromkeys([(DEFAULT, True), (DEFAULT, False), ("fp32", False)]))


def data_of(placement: Placement) -> TrainData:
    """Two batches of random images an epoch, cropped and flipped."""
    images_NHWC = np.random.default_rng(0).integers(0, 256, (IMAGES, SIDE, SIDE, 3), np.uint8)
    labels_N = np.arange(IMAGES) % CLASSES
    arrays = ImageSet("bench", images_NHWC, labels_N, tuple(map(str, range(CLASSES))))
    loading = Loading(
        batch_size=BATCH,
        seed=0,
        train=True,
        normalization=NORMALIZATION,
        placement=placement,
        geometry=Geometry(4, "zero", True),
    )
    loader = ResidentLoader(arrays, loading)
    facts = Facts((3, SIDE, SIDE), CLASSES, loader.labels_N, "class", NORMALIZATION)
    return TrainData(loader, loader, facts, images=IMAGES)


def trainer_of(
    student: Student, teacher: LoadedNet, data: TrainData, placement: Placement, *, compiled: bool
) -> Trainer:
    """A trainer of the student; those with the same `teacher` share what it is bound to."""
    seed, losses = student
    torch.manual_seed(seed)
    return build_trainer(
        Plan(stage="bench", digest="", seed=seed, data_seed=0, epochs=1),
        student=create_model("resnet8x4", CLASSES),
        teaching=Teaching((teacher,)),
        terms=losses(),
        data=data,
        settings=TrainingSettings(
            optim=OptimConfig(schedule="constant", lr=0.01),
            compile="on" if compiled else "off",
        ),
        placement=placement,
        output=Output(),
    )


def batches(trainer: Trainer) -> Iterator[tuple[Prepared, int, int]]:
    """Every batch with its epoch and step, without an end."""
    for epoch in forever():
        prepared = run_ahead(trainer.prepare(epoch), trainer.world.device)
        yield from ((one, epoch, step) for step, one in enumerate(prepared))


def step_of(trainers: Sequence[Trainer]) -> Callable[[], None]:
    """One step of each: loader, views, teacher, step, guard, metrics."""
    for trainer in trainers:
        trainer.runner.train()
    sources = [batches(trainer) for trainer in trainers]

    def step() -> None:
        for trainer, source in zip(trainers, sources, strict=True):
            trainer.optimize(*next(source))

    return step


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.step.state_dict().items()}


def check(trainers: Sequence[Trainer], alone: Sequence[Trainer]) -> None:
    """The check of the module's docstring."""
    for side in (trainers, *([one] for one in alone)):
        step = step_of(side)
        for _ in range(3):
            step()
    assert len({trainer.teacher for trainer in trainers}) == 1
    for number, (one, other) in enumerate(zip(trainers, alone, strict=True)):
        found, expected = weights(one), weights(other)
        assert found.keys() == expected.keys()
        unlike = [name for name, value in expected.items() if not torch.equal(found[name], value)]
        assert not unlike, f"student {number}: {', '.join(unlike)}"


@pytest.mark.parametrize(
    ("precision", "compiled"), HOW, ids=[f"{p}, {'compiled' if c else 'eager'}" for p, c in HOW]
)
@pytest.mark.parametrize("name", GROUPS)
def bench_together(name: str, precision: str, compiled: bool, table, race) -> None:
    students = GROUPS[name]
    placement = Placement(WORLD, resolve_precision(precision, WORLD.device))
    torch.manual_seed(1)
    net: nn.Module = create_model("resnet32x4", CLASSES)
    data = data_of(placement)

    def made(students: Sequence[Student]) -> list[Trainer]:
        teacher = LoadedNet(copy.deepcopy(net))
        return [trainer_of(one, teacher, data, placement, compiled=compiled) for one in students]

    together, alone = made(students), [made([one])[0] for one in students]
    shared = SharedBatches()
    for trainer in together:
        trainer.shared = shared
    check(together, alone)
    untaught = made([(0, lambda: [CrossEntropy()])])
    sides = {
        "together": step_of(together),
        "one alone": step_of(alone[:1]),
        "no teacher": step_of(untaught),
    }
    found = race(sides, of="one alone")
    assert all(trainer.guard.counts() == (0, 0) for trainer in (*together, alone[0], *untaught))
    num, ratio = len(students), found.ratio("together", "one alone")
    of_student, of_teacher = (count(one, (3, SIDE, SIDE)).macs for one in (alone[0].student, net))
    macs = of_teacher + num * step_macs(of_student, 0)
    table.rows.append(
        {
            "students": name,
            "how": f"{placement.precision.name}, {'compiled' if compiled else 'eager'}",
            "ms together": found.ms("together"),
            "ms one alone": found.ms("one alone"),
            "ms no teacher": found.ms("no teacher"),
            "time together / one": ratio.median,
            "p10": ratio.p10,
            "p90": ratio.p90,
            "arithmetic": macs / step_macs(of_student, of_teacher),
            "by measured times": 1 + (num - 1) * found.ratio("no teacher", "one alone").median,
            "one after another / together": num / ratio.median,
        }
    )
