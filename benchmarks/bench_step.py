"""Whole training steps, WRN-40-2 -> WRN-16-2 at 32 px, batch 64, CIFAR-100's class count.

    pytest benchmarks/bench_step.py -s            prints the ratios; --write-results keeps them

Rows: the loop as RepDistiller writes it (eager, fp32, NCHW, one host read per step); timm's
LogitDistillationTask in fastkd's precision, layout and compile mode; the bare compiled step that
the trainer wraps. All sides get the same in-memory batches and the same weights, and the first
loss must agree before anything is timed. Both sides of a ratio alternate in one process.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from pairs import compare, write_results
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd import create_model
from fastkd.api import ForeignLoader
from fastkd.build import Engine, TeacherNet, build_trainer
from fastkd.distributed import World
from fastkd.losses import KD
from fastkd.precision import resolve_precision
from fastkd.recipe.schema import OptimConfig
from fastkd.report.console import Console
from fastkd.trainer import Plan, Trainer

BATCH, CLASSES, SIDE, ROUNDS = 64, 100, 32, 24
Step = Callable[[], float]


class Setting:
    """Networks and batches that all sides share."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.student = create_model("wrn_16_2", CLASSES)
        self.teacher = create_model("wrn_40_2", CLASSES).eval().requires_grad_(False)
        self.images = torch.randn(BATCH, 3, SIDE, SIDE)
        self.labels = torch.randint(0, CLASSES, (BATCH,))

    def copies(self, *, channels_last: bool) -> tuple[nn.Module, nn.Module, Tensor]:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        student, teacher = copy.deepcopy(self.student), copy.deepcopy(self.teacher)
        moved = [net.to(memory_format=layout) for net in (student, teacher)]
        return *moved, self.images.contiguous(memory_format=layout)


def plain_loop(setting: Setting) -> Step:
    """A published KD loop's habits: eager, fp32, NCHW, loss and accuracy read every step."""
    student, teacher, images = setting.copies(channels_last=False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def step() -> float:
        logits = student(images)
        with torch.no_grad():
            target = teacher(images)
        soft = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(target / 4, 1), reduction="sum")
        loss = 0.1 * F.cross_entropy(logits, setting.labels) + 0.9 * soft * 16 / BATCH
        (logits.argmax(1) == setting.labels).float().mean().item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def timm_task(setting: Setting, engine: Engine) -> Step:
    """timm's task with the precision, layout and compiler of the engine."""
    from timm.task import LogitDistillationTask

    student, teacher, images = setting.copies(channels_last=engine.channels_last)
    for net in (student, teacher):  # what timm asks of a network
        net.pretrained_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    task = LogitDistillationTask(
        student_model=student,
        teacher_model=teacher,
        distill_loss_weight=0.9,
        task_loss_weight=0.1,
        temperature=4.0,
        criterion=nn.CrossEntropyLoss(),
        verbose=False,
    )
    if engine.compiled:
        task.compile(dynamic=False)
    optimizer = torch.optim.SGD(student.parameters(), 0.05, 0.9, weight_decay=5e-4, fused=True)

    def step() -> float:
        with engine.precision.autocast():
            loss = task(images, setting.labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def fastkd_trainer(setting: Setting, engine: Engine) -> Trainer:
    student, teacher, images = setting.copies(channels_last=engine.channels_last)
    loader = ForeignLoader([(images, setting.labels)], torch.device("cpu"), 0, True)
    return build_trainer(
        Plan(stage="bench", digest="", seed=0, epochs=1),
        student=student,
        teacher=TeacherNet(teacher),
        terms=[KD()],
        optim=OptimConfig(schedule="constant"),
        engine=engine,
        loader=loader,
        val_loader=loader,
        image_shape=(3, SIDE, SIDE),
        num_classes=CLASSES,
        train_labels_N=setting.labels,
        normalization=((0.0,) * 3, (1.0,) * 3),
        xprime="none",
        world=World(0, 0, 1, torch.device("cpu"), None),
        folder=None,
        console=Console(enabled=False),
    )


def trainer_step(trainer: Trainer) -> Step:
    """Everything the loop does for a batch: loader, views, teacher, step, guard, metrics."""
    trainer.runner.train()

    def step() -> float:
        before = trainer.totals_M.clone()
        for prepared in trainer._prepare(0):
            trainer._optimize(prepared, 0, 0)
        return ((trainer.totals_M - before)[1] / BATCH).item()

    return step


def bare_step(trainer: Trainer, setting: Setting) -> Step:
    """The trainer's own compiled units and optimizer without the trainer."""
    runner, teacher, optimizer = trainer.runner, trainer.teacher, trainer.optimizer
    runner.train()
    assert teacher is not None
    index = torch.arange(BATCH)
    images = setting.images.contiguous(memory_format=torch.channels_last)

    def step() -> float:
        views = {"x": images}
        loss = runner(views, setting.labels, index, teacher(views), {}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def engines() -> dict[str, Engine]:
    device = torch.device("cpu")
    default = resolve_precision("auto", device)
    found = {f"{default.name}, compiled": Engine(default, compiled=True)}
    fp32 = resolve_precision("fp32", device)
    return found | {
        "fp32, compiled": Engine(fp32, compiled=True),
        "fp32, eager": Engine(fp32, compiled=False),
    }


@pytest.mark.parametrize("name", engines())
def test_training_step(name: str, request: pytest.FixtureRequest) -> None:
    engine, setting = engines()[name], Setting()
    trainer, twin = fastkd_trainer(setting, engine), fastkd_trainer(setting, engine)
    sides: dict[str, Step] = {
        "fastkd": trainer_step(trainer),
        "plain loop (eager, fp32, NCHW)": plain_loop(setting),
        "timm LogitDistillationTask": timm_task(setting, engine),
        "bare step": bare_step(twin, setting),
    }
    first = {side: step() for side, step in sides.items()}
    tolerance = 1e-4 if engine.precision.name == "fp32" else 3e-2
    for side, loss in first.items():
        assert loss == pytest.approx(first["fastkd"], rel=tolerance), f"{side}: first loss differs"
    rows = compare(sides, "fastkd", rounds=ROUNDS, items=BATCH)
    write_results(request, "step_cpu", name, rows, losses=first)
