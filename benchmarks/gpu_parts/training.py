"""Part 4: a real training, CIFAR-10 ResNet-56 -> ResNet-20 by KD with the recipe's own program.

A first run of one epoch each compiles everything and tells the rates; the second one's schedule is
the recipe's 240 epochs scaled to the time that is left.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_parts.assets import unpacked_cifar10
from gpu_parts.record import Job

__all__ = ["run"]

RECIPE = "cifar10/resnet56--resnet20/kd"
FULL = 240


def run(job: Job) -> None:
    """Probe, then the run whose accuracy counts."""
    data = unpacked_cifar10(job.assets)
    if data is None:
        job.record.missing("the training: no cifar10-jpeg.tar.xz in --assets")
        if not job.rehearse:
            return
    keys = [f"data.root={data}"]
    if job.rehearse:
        keys = ["data.name=synthetic", "data.train_limit=128", "student.name=resnet8"]
        keys += ["teacher.name=resnet8", "teacher.min_accuracy=0", "device=cpu", "compile=off"]
    with tempfile.TemporaryDirectory() as folder:
        with job.record.case("one epoch"):
            train(job, Path(folder) / "probe", [*keys, "epochs=1", "teacher.epochs=1"])
        with job.record.case("training"):
            start = time.monotonic()
            probe = Path(folder) / "second"
            # Again, for the rates without compilation: the cache on disk has it all.
            train(job, probe, [*keys, "epochs=1", "teacher.epochs=1"])
            # Both networks go through an epoch; loading, evaluation and plots are in it too.
            each = time.monotonic() - start
            left = 0.9 * job.seconds_left() - 20
            epochs = 2 if job.rehearse else int(min(FULL, max(2, left / each)))
            job.record.note(f"{epochs} epochs each of the recipe's {FULL}: {each:.1f} s per epoch")
            final = [*keys, f"epochs={epochs}", f"teacher.epochs={epochs}"]
            train(job, Path(folder) / "final", final, keep=True)


def train(job: Job, place: Path, keys: list[str], *, keep: bool = False) -> None:
    """`fastkd train` in a process and a folder of its own; with `keep` its summaries become rows.

    A teacher is trained once per working directory: in a new one it is trained again.
    """
    command = [sys.executable, "-m", "fastkd.train", RECIPE, *keys, "out=run"]
    place.mkdir()
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=place, capture_output=True, text=True, timeout=max(20.0, job.seconds_left())
    )
    wall = time.monotonic() - start
    if done.returncode != 0:
        raise RuntimeError((done.stdout + done.stderr)[-1500:])
    if not keep:
        return
    for file in sorted(place.rglob("summary.json")):
        summary: dict[str, Any] = json.loads(file.read_text())
        wanted = ("epochs", "accuracy_last", "accuracy_best", "images_per_s", "data_wait",
                  "train_seconds", "skipped_steps")  # fmt: skip
        cells = {key: summary[key] for key in wanted if key in summary}
        job.record.row("training", run=str(file.parent.relative_to(place)), **cells)
    job.record.note(f"whole program {wall:.0f} s: {' '.join(command[1:])}")
    job.record.note(done.stdout.strip()[-1500:])
