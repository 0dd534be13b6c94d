"""Whole training steps, WRN-40-2 -> WRN-16-2 at 32 px, batch 64, 100 classes.

    pytest benchmarks/bench_step.py [--pairs 20] [--save-results]

Rows: the loop as RepDistiller writes it (eager, fp32, NCHW, one host read per step); timm's
LogitDistillationTask in fastkd's precision, layout and compile mode; the bare compiled step inside
the trainer. All sides start from the same weights on the same in-memory batches; the loss of their
first step is checked before anything is timed.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms

from fastkd import create_model
from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision, resolve_precision
from fastkd.compute.ranks import World
from fastkd.data import ImageSet, Loading, ResidentLoader
from fastkd.data.batch import TrainLoader
from fastkd.data.facts import Facts
from fastkd.data.geometry import Geometry
from fastkd.data.loaders.foreign import ForeignLoader
from fastkd.losses import KD
from fastkd.losses.base.term import LossTerm
from fastkd.teachers.cache.opening import AnswerCache
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.teaching import Teaching
from fastkd.testing import assert_mean_as_accurate, eager_step_rows
from fastkd.training.ahead import run_ahead
from fastkd.training.build import build_trainer
from fastkd.training.config import OptimConfig
from fastkd.training.progress import Plan
from fastkd.training.settings import Output, TrainData, TrainingSettings
from fastkd.training.trainer import Trainer

BATCH, CLASSES, SIDE = 64, 100, 32
CPU = torch.device("cpu")
Step = Callable[[], float]


@dataclass(frozen=True)
class Engine:
    """How a side computes."""

    precision: Precision
    compiled: bool
    channels_last: bool = True


class Setting:
    """Networks and one resident batch that all sides share; a call of a side is `steps` steps."""

    def __init__(
        self,
        student: str = "wrn_16_2",
        teachers: tuple[str, ...] = ("wrn_40_2",),
        *,
        batch: int = BATCH,
        classes: int = CLASSES,
        side: int = SIDE,
        device: torch.device = CPU,
        steps: int = 1,
    ) -> None:
        torch.manual_seed(0)
        self.world = World(0, 0, 1, device, None)
        self.device, self.classes, self.side, self.steps = device, classes, side, steps
        self.student = create_model(student, classes).to(device)
        nets = [create_model(name, classes).to(device) for name in teachers]
        self.teacher = (nets[0] if len(nets) == 1 else Together(nets)).eval().requires_grad_(False)
        self.images = torch.randn(batch, 3, side, side, device=device)
        self.labels = torch.randint(0, classes, (batch,), device=device)

    def copies(self, *, channels_last: bool) -> tuple[nn.Module, nn.Module, Tensor]:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        student, teacher = copy.deepcopy(self.student), copy.deepcopy(self.teacher)
        moved = [net.to(memory_format=layout) for net in (student, teacher)]
        return *moved, self.images.contiguous(memory_format=layout)


class Together(nn.Module):
    """Several teachers as one network, for loops that know one: logits of the mean probability."""

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, images: Tensor) -> Tensor:
        logits = [net(images) for net in self.nets]
        wide = torch.promote_types(logits[0].dtype, torch.float32)
        return torch.stack([one.softmax(1, dtype=wide) for one in logits]).mean(0).log()


def plain_loop(setting: Setting) -> Step:
    """A published KD loop's habits: eager, fp32, NCHW, loss and accuracy read every step."""
    student, teacher, images = setting.copies(channels_last=False)
    update = plain_update(student, teacher)
    return repeated(lambda: update(images, setting.labels), setting)


def repeated(run: Callable[[], Tensor | float], setting: Setting) -> Step:
    """`run` setting.steps times; the host reads only the last result, unless `run` itself reads."""

    def several() -> float:
        for _ in range(setting.steps - 1):
            run()
        return float(run())

    return several


def plain_update(student: nn.Module, teacher: nn.Module) -> Callable[[Tensor, Tensor], float]:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def update(images: Tensor, labels: Tensor) -> float:
        logits = student(images)
        with torch.no_grad():
            target = teacher(images)
        soft = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(target / 4, 1), reduction="sum")
        loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * soft * 16 / len(labels)
        (logits.argmax(1) == labels).float().mean().item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return update


def timm_task(setting: Setting, engine: Engine, mode: str | None = None) -> Step:
    """timm's task in the engine's precision, layout and compile mode; `mode` is torch.compile's."""
    from timm.task import LogitDistillationTask

    student, teacher, images = setting.copies(channels_last=engine.channels_last)
    for net in (student, teacher):  # attributes that timm expects of a network
        net.pretrained_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
        net.in_chans = 3
    task = LogitDistillationTask(
        student_model=student,
        teacher_model=teacher,
        distill_loss_weight=0.9,
        task_loss_weight=0.1,
        temperature=4.0,
        criterion=nn.CrossEntropyLoss(),
        device=setting.device,
        verbose=False,
    )
    if engine.compiled:
        task.compile(dynamic=False, mode=mode)
    optimizer = torch.optim.SGD(student.parameters(), 0.05, 0.9, weight_decay=5e-4, fused=True)

    def step() -> Tensor:
        with engine.precision.autocast():
            loss = task(images, setting.labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return repeated(step, setting)


def fastkd_trainer(
    setting: Setting,
    engine: Engine,
    loader: TrainLoader | None = None,
    cache: AnswerCache | None = None,
    terms: Sequence[LossTerm] = (),
) -> Trainer:
    """The trainer on `loader`, by default on the one batch; cache: of the teacher's answers.

    terms: the losses, by default KD.
    """
    student, teacher, images = setting.copies(channels_last=engine.channels_last)
    nets = teacher.nets if isinstance(teacher, Together) else [teacher]
    batches = [(images, setting.labels)] * setting.steps
    loader = loader or ForeignLoader(batches, Placement(setting.world, engine.precision), seed=0)
    facts = Facts(
        image_shape=(3, setting.side, setting.side),
        num_classes=setting.classes,
        labels_N=setting.labels,
        label_kind="class",
        normalization=((0.0,) * 3, (1.0,) * 3),
    )
    return build_trainer(
        Plan(stage="bench", digest="", seed=0, epochs=1),
        student=student,
        teaching=Teaching(tuple(map(LoadedNet, nets)), cache),
        terms=terms or [KD()],
        data=TrainData(loader, loader, facts, images=len(setting.labels)),
        settings=TrainingSettings(
            optim=OptimConfig(schedule="constant"),
            compile="on" if engine.compiled else "off",
        ),
        placement=Placement(setting.world, engine.precision, engine.channels_last),
        output=Output(),
    )


def trainer_step(trainer: Trainer, setting: Setting) -> Step:
    """All that the loop does for a batch: loader, views, teacher, step, guard, metrics."""
    trainer.runner.train()
    device = trainer.world.device

    def step() -> float:
        before = trainer.totals_M.clone()
        for prepared in islice(run_ahead(trainer.prepare(0), device), setting.steps):
            trainer.optimize(prepared, 0, 0)
        images, loss = (trainer.totals_M - before)[:2].tolist()
        return loss / images

    return step


def bare_step(trainer: Trainer, setting: Setting) -> Step:
    """The trainer's own compiled units and optimizer without the trainer."""
    runner, teacher, optimizer = trainer.runner, trainer.teacher, trainer.optimizer
    runner.train()
    assert teacher is not None
    index = torch.arange(len(setting.labels), device=setting.device)
    images = setting.images.contiguous(memory_format=torch.channels_last)

    def step() -> Tensor:
        views = {"x": images}
        loss = runner(views, setting.labels, index, teacher(views), {}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return repeated(step, setting)


def formula_rows(setting: Setting, dtype: torch.dtype) -> Tensor:
    """Loss of every image in a first step by the formula; dtype as in `eager_step_rows`."""
    batch = setting.images, setting.labels
    kd_N, ce_N = eager_step_rows(setting.student, setting.teacher, *batch, dtype)
    return 0.1 * ce_N + 0.9 * kd_N


def engines() -> dict[str, Engine]:
    default, fp32 = (resolve_precision(name, CPU) for name in ("auto", "fp32"))
    found = {f"{default.name}, compiled": Engine(default, compiled=True)}
    return found | {
        "fp32, compiled": Engine(fp32, compiled=True),
        "fp32, eager": Engine(fp32, compiled=False),
    }


def add_rows(table, case: str, found, images: int) -> None:
    """A row per side with the ratio time(side) / time(fastkd): above 1, fastkd is faster."""
    for side in found.seconds:
        ratio = found.ratio(side)
        table.rows.append(
            {
                "case": case,
                "side": side,
                "ms": found.ms(side),
                "images/s": 1e3 * images / found.ms(side),
                "time / fastkd": ratio.median,
                "p10": ratio.p10,
            }
        )


@pytest.mark.parametrize("name", engines())
def bench_training_step(name: str, table, race) -> None:
    engine, setting = engines()[name], Setting()
    trainer, twin = fastkd_trainer(setting, engine), fastkd_trainer(setting, engine)
    sides: dict[str, Step] = {
        "fastkd": trainer_step(trainer, setting),
        "plain loop (eager, fp32, NCHW)": plain_loop(setting),
        "timm LogitDistillationTask": timm_task(setting, engine),
        "bare step": bare_step(twin, setting),
    }
    eager_N, truth_N = (formula_rows(setting, t) for t in (engine.precision.dtype, torch.float64))
    for side, step in sides.items():
        assert_mean_as_accurate(f"{side}, first loss", step(), eager_N, truth_N)
    add_rows(table, name, race(sides), BATCH)


def pictures_in_memory(num: int) -> ImageSet:
    images_NHWC = np.random.default_rng(0).integers(0, 256, (num, SIDE, SIDE, 3), np.uint8)
    return ImageSet("bench", images_NHWC, np.arange(num) % CLASSES, tuple(map(str, range(CLASSES))))


def resident_loader(pictures: ImageSet, setting: Setting, engine: Engine) -> ResidentLoader:
    """Batches with crop and flip."""
    return ResidentLoader(
        pictures,
        Loading(
            batch_size=BATCH,
            seed=0,
            train=True,
            normalization=((0.5,) * 3, (0.25,) * 3),
            placement=Placement(setting.world, engine.precision),
            geometry=Geometry(4, "zero", True),
        ),
    )


def bench_end_to_end(table, race) -> None:
    """Each side with its own loader, over epochs of 1,024 images with crop and flip."""
    default, setting = next(iter(engines().values())), Setting()
    arrays = pictures_in_memory(1024)
    resident = resident_loader(arrays, setting, default)
    trainer = fastkd_trainer(setting, default, resident)
    trainer.runner.train()
    crops = transforms.Compose(
        [
            transforms.RandomCrop(SIDE, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.25,) * 3),
        ]
    )
    pictures = [Image.fromarray(image) for image in arrays.images_NHWC]
    labels = arrays.labels_N.tolist()
    dataset = list(zip(pictures, labels, strict=True))
    plain = DataLoader(
        Transformed(dataset, crops), BATCH, shuffle=True, num_workers=2, persistent_workers=True
    )
    student, teacher, _ = setting.copies(channels_last=False)
    update = plain_update(student, teacher)

    def fastkd_epoch() -> None:
        for step, prepared in enumerate(trainer.prepare(0)):
            trainer.optimize(prepared, 0, step)

    def plain_epoch() -> None:
        for images, labels in plain:
            update(images, labels)

    sides = {"fastkd": fastkd_epoch, "plain loop, torchvision DataLoader": plain_epoch}
    found = race(sides)
    assert trainer.guard.counts() == (0, 0)
    add_rows(table, "end to end, each with its own loader", found, 1024)


class Transformed(torch.utils.data.Dataset):
    """Per-sample transforms in worker processes, as in the published loops."""

    def __init__(self, items: list, transform: Callable) -> None:
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.items[index]
        return self.transform(picture), label
