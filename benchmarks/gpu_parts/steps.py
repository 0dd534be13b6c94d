"""Part 3: whole training steps on resident synthetic batches, fastkd's defaults against the others.

The sides are those of bench_step.py, a call being several steps with one wait at its end: fastkd's
loop (views, teacher one batch ahead, step, guard, metrics), the plain loop of published code,
timm's task in the same precision and layout, compiled as its train.py does and with CUDA graphs,
RepDistiller's and mdistiller's own loops from --assets. All start from the same weights; the first
losses must agree.
"""

import copy
import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
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
from fastkd.testing import captured, interleave, speedup

__all__ = ["run"]

# student, teachers, batch, classes, side; bar against timm's compiled task
PAIRS = {
    "wrn_40_2 -> wrn_16_2, 32 px": (("wrn_16_2", ("wrn_40_2",), 64, 100, 32), 1.5),
    "resnet32x4 -> resnet8x4, 32 px": (("resnet8x4", ("resnet32x4",), 64, 100, 32), 1.5),
    "resnet34 -> resnet18, 224 px":
        (("torchvision:resnet18", ("torchvision:resnet34",), 256, 1000, 224), 1.05),
    # MEAL V2's kind: a mean of two teachers, which timm's task gets as one network
    "timm resnet50 + resnet101 -> efficientnet_b0, 224 px":
        (("timm:efficientnet_b0", ("timm:resnet50", "timm:resnet101"), 256, 1000, 224), 1.05),
}  # fmt: skip
TINY = {
    "wrn_16_1 -> wrn_10_1, 16 px": (("wrn_10_1", ("wrn_16_1",), 8, 10, 16), 1.5),
    "timm test_resnet and its like -> test_resnet, 32 px":
        (("timm:test_resnet", ("timm:test_resnet", "timm:test_resnet"), 8, 10, 32), 1.05),
}  # fmt: skip
FASTKD = "fastkd"


def run(job: Job) -> None:
    """Every pair; what a launch costs is largest at 32 px."""
    for name, (networks, bar) in (TINY if job.rehearse else PAIRS).items():
        if job.in_time(name, 45):
            with job.record.case(name):
                pair(job, name, networks, bar)
        torch._dynamo.reset()


def pair(job: Job, name: str, networks: tuple[Any, ...], bar: float) -> None:
    """All sides of one student and teacher."""
    student, teachers, batch, classes, side = networks
    steps = 2 if job.rehearse else (40 if side <= 32 else 8)
    setting = bench_step.Setting(
        student, teachers, batch=batch, classes=classes, side=side, device=job.device, steps=steps
    )
    # A CPU's autocast leaves the softmax and KL of timm's task in bf16, where its loss is off by a
    # third (0.20 against 0.32 in this pair, compiled or not); a GPU's takes them to fp32.
    precision = resolve_precision("fp32" if job.rehearse else "auto", job.device)
    engine = bench_step.Engine(precision, compiled=True)
    trainer = bench_step.fastkd_trainer(setting, engine)
    sides: dict[str, bench_step.Step] = {
        FASTKD: bench_step.trainer_step(trainer, setting),
        "timm task, compiled": bench_step.timm_task(setting, engine),
    }
    if not job.rehearse:
        graphs = bench_step.timm_task(setting, engine, mode="reduce-overhead")
        sides["timm task, CUDA graphs"] = graphs
    # The yardstick: the compiled units without the trainer around them.
    sides["bare step"] = bench_step.bare_step(bench_step.fastkd_trainer(setting, engine), setting)
    if not job.rehearse:
        eager = bench_step.fastkd_trainer(setting, replace(engine, compiled=False))
        sides["fastkd, not compiled"] = bench_step.trainer_step(eager, setting)
    sides["plain loop (eager, fp32, NCHW)"] = bench_step.plain_loop(setting)
    setting.steps = 1
    first: dict[str, float] = {}
    for label in list(sides):
        with job.record.case(f"{name}, {label}"):
            first[label] = sides[label]()
        if label not in first:
            del sides[label]
    for label, loss in first.items():
        # bf16 against fp32 of the plain loop
        if abs(loss / first[FASTKD] - 1) > 0.05:
            raise AssertionError(f"{label}: the first losses differ: {first}")
    setting.steps = steps
    sides |= peers(job, setting) if side <= 32 else {}
    pairs = 2 if job.rehearse else (20 if side <= 32 else 6)
    seconds = interleave(sides, pairs)
    for label, values in seconds.items():
        ratio, p10 = speedup(seconds, label, FASTKD)
        wall = statistics.median(values)
        busy, by_name = kernel_seconds(sides[label], job.device)
        job.record.row(
            "steps", pair=name, side=label, **{"ms/step": 1e3 * wall / steps},
            **{"images/s": steps * batch / wall, "kernels ms/step": 1e3 * busy / steps},
            **{"busy": busy / wall, "peak MB": peak_bytes(sides[label], job.device) / 1e6},
            **{"time / fastkd": ratio, "p10": p10},
        )  # fmt: skip
        if label in (FASTKD, "timm task, compiled"):
            most = {key[:60]: round(1e3 * s / steps, 4) for key, s in list(by_name.items())[:8]}
            job.record.note(f"{name}, {label}, kernel ms/step: {most}")
    bars = {"timm task, compiled": bar, "mdistiller": 3.0, "RepDistiller": 10.0}
    for label, wanted in bars.items():
        if label in seconds:
            ratio, _ = speedup(seconds, label, FASTKD)
            if ratio < wanted:
                job.record.short(f"{name}: {wanted} times {label}", f"{ratio:.2f}")
    teacher = trainer.teacher
    assert teacher is not None
    views = {"x": setting.images.to(precision.dtype, memory_format=torch.channels_last)}
    ahead(job, name, lambda: teacher(views))


def ahead(job: Job, name: str, teacher: Callable[[], Any]) -> None:
    """The teacher alone, as it runs and as one CUDA graph: whether capturing it would pay."""
    sides = {"as it runs": teacher, "captured": captured(teacher, job.device)}
    seconds = interleave(sides, 3 if job.rehearse else 50)
    medians = {f"{side} ms": 1e3 * statistics.median(v) for side, v in seconds.items()}
    gain, p10 = speedup(seconds, "as it runs", "captured")
    job.record.row("teacher alone", pair=name, **medians, gain=gain, p10=p10)


def peers(job: Job, setting: bench_step.Setting) -> dict[str, bench_step.Step]:
    """The loops of other people whose checkouts are in --assets."""
    found: dict[str, bench_step.Step] = {}
    folder = job.assets or Path()
    batches = [(setting.images, setting.labels, torch.arange(len(setting.labels)))] * setting.steps
    repdistiller = load_repdistiller(folder / "RepDistiller") if job.assets else None
    if repdistiller is None:
        job.record.missing("RepDistiller: no checkout in --assets")
    else:
        # Its loop wants networks with is_feat; the zoo's are the same architectures.
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
    """A network as RepDistiller's loop calls it: features and logits, with an argument more."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(
        self, images: Tensor, is_feat: bool = False, preact: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        logits = self.net(images)
        return [logits], logits


class WithNothing(nn.Module):
    """A network as mdistiller calls it: logits and features."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.net(images), {}


def mdistiller_loop(kd: Any, setting: bench_step.Setting) -> bench_step.Step:
    """Its class KD in the iteration of its trainer, which reads loss and both accuracies."""
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
        loss = sum(part.mean() for part in losses.values())
        loss.backward()
        optimizer.step()
        top = logits.topk(5, 1).indices == setting.labels[:, None]
        top[:, :1].any(1).float().mean().item()
        top.any(1).float().mean().item()
        return loss.item()

    return bench_step.repeated(step, setting)
