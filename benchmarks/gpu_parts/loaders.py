"""Part 5: do the images come in time? Resident sets, and JPEG files for a ResNet-50 step.

Resident: CIFAR-sized images with padded crops and flips, alone and with a policy and erasing.
Files: `fastkd bench data` on photographs, by DALI and by Pillow: the loader alone, the step alone
and both; the wait is what the step loses.
"""

import os
import shutil
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_parts.assets import UNPACKED, unpacked
from gpu_parts.record import Job

from fastkd.compute.placement import Placement
from fastkd.compute.precision import resolve_precision
from fastkd.compute.ranks import World
from fastkd.data import ImageSet, Loading, ResidentLoader
from fastkd.data.finish import PLAIN, Look
from fastkd.data.geometry import Geometry
from fastkd.data.policies.policy import make_policy
from fastkd.output.console import Console
from fastkd.recipes.loading import load_recipe
from fastkd.runs.stages import Session
from fastkd.runs.throughput import measure_throughput

__all__ = ["run"]

RESIDENT_BAR, WAIT_BAR = 1_000_000, 0.03
LOOKS = {
    "crop, flip": PLAIN,
    "crop, flip, trivial, erasing": Look(make_policy("trivial"), 0.25),
    "crop, flip, randaugment": Look(make_policy("randaugment")),
}
BACKENDS = ("dali", "torch")
COPIES = 20
"""Of 100 photographs, for an epoch of some batches."""


def run(job: Job) -> None:
    """Every case, cheapest first."""
    for name, look in LOOKS.items():
        with job.record.case(f"resident, {name}"):
            resident(job, name, look)
    photographs = copied(job)
    if photographs is None:
        job.record.missing("files: no imagenet-sample100.tar.xz in --assets")
        return
    for backend in BACKENDS:
        if job.in_time(f"files, {backend}", 35):
            with job.record.case(f"files, {backend}"):
                files(job, photographs, backend)


def world_of(job: Job) -> World:
    return World(0, 0, 1, job.device, None)


def resident(job: Job, name: str, look: Look) -> None:
    """Images a second of a resident set, in batches of 1,024."""
    num, batch = (512, 64) if job.rehearse else (50_000, 1024)
    pixels = np.random.default_rng(0).integers(0, 256, (num, 32, 32, 3), np.uint8)
    images = ImageSet("random/train", pixels, np.arange(num) % 10, tuple(map(str, range(10))))
    precision = resolve_precision("auto", job.device)
    loading = Loading(
        batch_size=batch,
        seed=0,
        train=True,
        normalization=((0.5,) * 3, (0.25,) * 3),
        placement=Placement(world_of(job), precision),
        geometry=Geometry(padding=4, flip=True),
        look=look,
    )
    loader = ResidentLoader(images, loading)
    shown, start = 0, time.perf_counter()
    for epoch in count():
        for each in loader.epoch(epoch):
            shown += len(each.labels_N)
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        if epoch == 0:  # allocates, and draws the first tables
            shown, start = 0, time.perf_counter()
        elif job.rehearse or time.perf_counter() - start > 3:
            break
    rate = shown / (time.perf_counter() - start)
    job.record.row("resident 32x32", {"what": name, "images/s": round(rate)})
    if rate < RESIDENT_BAR and look is PLAIN:
        job.record.short(f"resident, {name}: {RESIDENT_BAR:,} images/s", f"{rate:,.0f}")


def copied(job: Job) -> Path | None:
    """train/ and val/ with the photographs of the assets several times."""
    source = unpacked(job.assets, "imagenet-sample100.tar.xz", "imagenet-sample")
    if source is None:
        return None
    root = UNPACKED / "photographs"
    shutil.rmtree(root, ignore_errors=True)
    copies = 1 if job.rehearse else COPIES
    for file in sorted(source.glob("*/*")):
        for split, number in (("train", copies), ("val", 1)):
            for copy in range(number):
                target = root / split / file.parent.name / f"{copy}-{file.name}"
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, target)
    return root


def files(job: Job, photographs: Path, backend: str) -> None:
    """Loader, step and both for ResNet-50 on random areas of 224 pixels."""
    cores = len(os.sched_getaffinity(0))
    small = ["student.name=resnet8", "data.image_size=32", "batch_size=8", "device=cpu"]
    words = [
        f"data.root={photographs}",
        f"data.backend={backend}",
        f"data.workers={2 if job.rehearse else cores}",
        "teacher=null",
        "losses.kd=null",
        "losses.ce.weight=1",
        *(small if job.rehearse else ["student.name=timm:resnet50", "batch_size=256"]),
    ]
    recipe = load_recipe("folder", overrides=words)
    session = Session(world_of(job), Console(enabled=False), UNPACKED / "runs")
    found: dict[str, Any] = measure_throughput(recipe, session, 0.2 if job.rehearse else 6.0)
    rates = {key: round(found[f"{key}_images_per_s"]) for key in ("loader", "step", "both")}
    cells = {"backend": backend, "workers": found["workers"], **rates, "waits": found["waits"]}
    job.record.row("ResNet-50, JPEG files", cells)
    if found["waits"] > WAIT_BAR and backend == "dali":
        bar = f"files, {backend}: the step waits at most {WAIT_BAR:.0%}"
        job.record.short(bar, f"{found['waits']:.1%}")
