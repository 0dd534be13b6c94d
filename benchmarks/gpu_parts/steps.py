"""Part 3: whole training steps on resident synthetic batches, fastkd's defaults against the others.

The sides come from bench_step.py; a call is several steps with one wait at its end. They are
fastkd's loop (views, teacher one batch ahead, step, guard, metrics), the plain loop of published
code, timm's task in the same precision and layout, compiled as its train.py does and with CUDA
graphs, and RepDistiller's and mdistiller's own loops from --assets. All start from the same
weights; the loss of their first step is checked.
"""

import copy
import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bench_step
import torch
from bench_drop_in import load_repdistiller, repdistiller_epoch
from gpu_parts.assets import load_mdistiller_kd
from gpu_parts.clock import kernel_seconds, peak_bytes
from gpu_parts.record import Job
from torch import Tensor, nn

from fastkd.compute.precision import resolve_precision
from fastkd.testing import assert_mean_as_accurate, captured, interleave, speedup

__all__ = ["run"]

FASTKD, TIMM = "fastkd", "timm task, compiled"
Sides = dict[str, bench_step.Step]


@dataclass(frozen=True)
class Pair:
    """A student, its teachers and the batches they see."""

    student: str
    teachers: tuple[str, ...]
    batch: int
    classes: int
    side: int
    bar: float
    """How many times as fast as timm's compiled task fastkd has to be."""

    @property
    def small(self) -> bool:
        """Whether launches cost more than arithmetic: at CIFAR's size."""
        return self.side <= 32


PAIRS = {
    "wrn_40_2 -> wrn_16_2, 32 px": Pair(
        "wrn_16_2", ("wrn_40_2",), batch=64, classes=100, side=32, bar=1.5
    ),
    "resnet32x4 -> resnet8x4, 32 px": Pair(
        "resnet8x4", ("resnet32x4",), batch=64, classes=100, side=32, bar=1.5
    ),
    "resnet34 -> resnet18, 224 px": Pair(
        "torchvision:resnet18",
        ("torchvision:resnet34",),
        batch=256,
        classes=1000,
        side=224,
        bar=1.05,
    ),
    # As in MEAL V2: the mean of two teachers, which timm's task gets as one network.
    "timm resnet50 + resnet101 -> efficientnet_b0, 224 px": Pair(
        "timm:efficientnet_b0",
        ("timm:resnet50", "timm:resnet101"),
        batch=256,
        classes=1000,
        side=224,
        bar=1.05,
    ),
}
TINY = {
    "wrn_16_1 -> wrn_10_1, 16 px": Pair(
        "wrn_10_1", ("wrn_16_1",), batch=8, classes=10, side=16, bar=1.5
    ),
    "timm test_resnet and its like -> test_resnet, 32 px": Pair(
        "timm:test_resnet",
        ("timm:test_resnet", "timm:test_resnet"),
        batch=8,
        classes=10,
        side=32,
        bar=1.05,
    ),
}


def run(job: Job) -> None:
    """Every pair; the small ones first, where launches cost most."""
    for name, pair in (TINY if job.rehearse else PAIRS).items():
        if job.in_time(name, 45):
            with job.record.case(name):
                measure(job, name, pair)
        torch._dynamo.reset()


def measure(job: Job, name: str, pair: Pair) -> None:
    """All sides of one student and its teachers."""
    steps = 2 if job.rehearse else (40 if pair.small else 8)
    setting = bench_step.Setting(
        pair.student,
        pair.teachers,
        batch=pair.batch,
        classes=pair.classes,
        side=pair.side,
        device=job.device,
        steps=steps,
    )
    # A CPU's autocast leaves the softmax and KL of timm's task in bf16, where its loss is off by a
    # third (0.20 against 0.32 in this pair, compiled or not); a GPU's takes them to fp32.
    precision = resolve_precision("fp32" if job.rehearse else "auto", job.device)
    engine = bench_step.Engine(precision, compiled=True)
    trainer = bench_step.fastkd_trainer(setting, engine)
    sides = {FASTKD: bench_step.trainer_step(trainer, setting), **others(job, setting, engine)}
    setting.steps = 1
    check(job, name, setting, sides, precision.dtype)
    setting.steps = steps
    sides |= peers(job, setting) if pair.small else {}
    report(job, name, pair, sides, steps)
    teacher = trainer.teacher
    assert teacher is not None
    views = {"x": setting.images.to(precision.dtype, memory_format=torch.channels_last)}
    ahead(job, name, lambda: teacher(views))


def others(job: Job, setting: bench_step.Setting, engine: bench_step.Engine) -> Sides:
    """What fastkd's loop is timed beside."""
    sides = {TIMM: bench_step.timm_task(setting, engine)}
    if not job.rehearse:
        graphs = bench_step.timm_task(setting, engine, mode="reduce-overhead")
        sides["timm task, CUDA graphs"] = graphs
    # The yardstick: the compiled units without the trainer around them.
    sides["bare step"] = bench_step.bare_step(bench_step.fastkd_trainer(setting, engine), setting)
    if not job.rehearse:
        eager = bench_step.fastkd_trainer(setting, replace(engine, compiled=False))
        sides["fastkd, not compiled"] = bench_step.trainer_step(eager, setting)
    sides["plain loop (eager, fp32, NCHW)"] = bench_step.plain_loop(setting)
    return sides


def check(
    job: Job, name: str, setting: bench_step.Setting, sides: Sides, dtype: torch.dtype
) -> None:
    """Hold the loss of the first step against the formula; drop a side that does not run at all."""
    eager_N, truth_N = (bench_step.formula_rows(setting, t) for t in (dtype, torch.float64))
    first: dict[str, float] = {}
    for label in list(sides):
        with job.record.case(f"{name}, {label}"):
            first[label] = sides[label]()
        if label not in first:
            del sides[label]
    for label, loss in first.items():
        assert_mean_as_accurate(f"{label}, first loss", loss, eager_N, truth_N)


def report(job: Job, name: str, pair: Pair, sides: Sides, steps: int) -> None:
    """Time the sides in turns; their rows, their longest kernels, and the bars that are missed."""
    seconds = interleave(sides, 2 if job.rehearse else (20 if pair.small else 6))
    for label, values in seconds.items():
        ratio = speedup(seconds, label, FASTKD)
        wall = statistics.median(values)
        busy, by_name = kernel_seconds(sides[label], job.device)
        job.record.row(
            "steps",
            {
                "pair": name,
                "side": label,
                "ms/step": 1e3 * wall / steps,
                "images/s": steps * pair.batch / wall,
                "kernels ms/step": 1e3 * busy / steps,
                "busy": busy / wall,
                "peak MB": peak_bytes(sides[label], job.device) / 1e6,
                "time / fastkd": ratio.median,
                "p10": ratio.p10,
            },
        )
        if label in (FASTKD, TIMM):
            most = {key[:60]: round(1e3 * s / steps, 4) for key, s in list(by_name.items())[:8]}
            job.record.note(f"{name}, {label}, kernel ms/step: {most}")
    for label, wanted in {TIMM: pair.bar, "mdistiller": 3.0, "RepDistiller": 10.0}.items():
        if label in seconds:
            ratio = speedup(seconds, label, FASTKD)
            if ratio.median < wanted:
                job.record.short(f"{name}: {wanted} times {label}", f"{ratio.median:.2f}")


def ahead(job: Job, name: str, teacher: Callable[[], Any]) -> None:
    """The teacher alone, as it runs and as one CUDA graph: whether capturing it would pay."""
    sides = {"as it runs": teacher, "captured": captured(teacher, job.device)}
    seconds = interleave(sides, 3 if job.rehearse else 50)
    medians = {f"{side} ms": 1e3 * statistics.median(v) for side, v in seconds.items()}
    gain = speedup(seconds, "as it runs", "captured")
    row = {"pair": name, **medians, "gain": gain.median, "p10": gain.p10}
    job.record.row("teacher alone", row)


def peers(job: Job, setting: bench_step.Setting) -> Sides:
    """Other people's loops, from the checkouts in --assets."""
    found: Sides = {}
    folder = job.assets or Path()
    batches = [(setting.images, setting.labels, torch.arange(len(setting.labels)))] * setting.steps
    repdistiller = load_repdistiller(folder / "RepDistiller") if job.assets else None
    if repdistiller is None:
        job.record.missing("RepDistiller: no checkout in --assets")
    else:
        # Its loop needs networks with is_feat; those of our zoo have the same architecture.
        nets = (WithFeatures(setting.student), WithFeatures(setting.teacher))
        found["RepDistiller"] = repdistiller_epoch(
            repdistiller, *nets, repdistiller.kd.DistillKL(4), batches, job.device
        )
        job.record.note(f"RepDistiller at {repdistiller.commit}")
    kd = load_mdistiller_kd(folder / "mdistiller") if job.assets else None
    if kd is None:
        job.record.missing("mdistiller: no checkout in --assets")
    else:
        found["mdistiller"] = mdistiller_loop(kd, setting)
    return found


class WithFeatures(nn.Module):
    """A network as RepDistiller's loop calls it: with is_feat, returning features and logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(
        self, images: Tensor, is_feat: bool = False, preact: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        logits = self.net(images)
        return [logits], logits


class WithNothing(nn.Module):
    """A network as mdistiller calls it: returning logits and features."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.net(images), {}


def mdistiller_loop(kd: Any, setting: bench_step.Setting) -> bench_step.Step:
    """Its class KD in an iteration of its trainer, which reads the loss and both accuracies."""
    weights = Namespace(CE_WEIGHT=0.1, KD_WEIGHT=0.9)
    settings = Namespace(KD=Namespace(TEMPERATURE=4.0, LOSS=weights))
    nets = [WithNothing(copy.deepcopy(net)) for net in (setting.student, setting.teacher)]
    distiller = kd(*nets, settings).to(setting.device)
    distiller.train()
    learned = distiller.get_learnable_parameters()
    optimizer = torch.optim.SGD(learned, 0.05, momentum=0.9, weight_decay=5e-4)

    def step() -> float:
        optimizer.zero_grad()
        logits, losses = distiller(image=setting.images, target=setting.labels, epoch=1)
        loss = torch.stack([part.mean() for part in losses.values()]).sum()
        loss.backward()
        optimizer.step()
        top = logits.topk(5, 1).indices == setting.labels[:, None]
        top[:, :1].any(1).float().mean().item()
        top.any(1).float().mean().item()
        return loss.item()

    return bench_step.repeated(step, setting)
