"""Part 4: a real training, CIFAR-10 ResNet-56 -> ResNet-20 by KD with the command line program.

The first run, one epoch per network, reads the data and compiles everything. The second shows what
an epoch and the start of a run cost. The third is the result: the recipe's 240 epochs, its schedule
scaled to the remaining time.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_parts.assets import UNPACKED, unpacked
from gpu_parts.record import Job

__all__ = ["run"]

RECIPE = "cifar10/resnet56--resnet20/kd"
FULL = 240
SHOWN = (
    "epochs",
    "accuracy_last",
    "accuracy_best",
    "images_per_s",
    "data_wait",
    "train_seconds",
    "skipped_steps",
)


def run(job: Job) -> None:
    """Two probes, then the run whose accuracy counts."""
    data = unpacked(job.assets, "cifar10-jpeg.tar.xz", "cifar10")
    if data is None:
        job.record.missing("the training: no cifar10-jpeg.tar.xz in --assets")
        if not job.rehearse:
            return
    keys = [f"data.root={data}"] if data else ["data.name=synthetic"]
    if job.rehearse:
        keys += ["data.train_limit=128", "student.name=resnet8", "teacher.name=resnet8"]
        keys += ["student.width=0.25", "teacher.width=0.25", "teacher.min_accuracy=0"]
        keys += ["device=cpu", "compile=off"]
    with tempfile.TemporaryDirectory() as folder:
        with job.record.case("one epoch"):
            train(job, Path(folder) / "probe", [*keys, "epochs=1", "teacher.epochs=1"])
        with job.record.case("training"):
            start = time.monotonic()
            # Again, for rates without compilation: everything is in the cache on disk.
            stages = train(job, Path(folder) / "second", [*keys, "epochs=1", "teacher.epochs=1"])
            wall = time.monotonic() - start
            # An epoch of both networks, plus a quarter for the evaluation at its end.
            each = min(wall, 1.25 * sum(stage["train_seconds"] for stage in stages.values()))
            left = 0.9 * job.seconds_left() - (wall - each)
            epochs = 2 if job.rehearse else int(min(FULL, max(2, left / each)))
            job.record.note(
                f"{epochs} epochs each of the recipe's {FULL}: {each:.1f} s per epoch, "
                f"{wall - each:.1f} s to start and end"
            )
            start = time.monotonic()
            final = [*keys, f"epochs={epochs}", f"teacher.epochs={epochs}"]
            stages = train(job, Path(folder) / "final", final)
            job.record.note(f"whole program {time.monotonic() - start:.0f} s: {' '.join(final)}")
            for name, summary in stages.items():
                job.record.row("training", {"run": name, **{key: summary[key] for key in SHOWN}})


def train(job: Job, out: Path, keys: list[str]) -> dict[str, dict[str, Any]]:
    """`fastkd train` in a process of its own; the summary of each network it trained."""
    command = [sys.executable, "-m", "fastkd.train", RECIPE, *keys, "out=student"]
    out.mkdir()
    done = subprocess.run(
        command,
        # A folder of its own: a later run would reuse the teacher of this one.
        cwd=out,
        env={**os.environ, "FASTKD_CACHE": str(UNPACKED / "cache")},
        capture_output=True,
        text=True,
        timeout=max(20.0, job.seconds_left()),
    )
    if done.returncode != 0:
        raise RuntimeError((done.stdout + done.stderr)[-1500:])
    found = [json.loads(file.read_text()) for file in sorted(out.rglob("summary.json"))]
    if len(found) != 2:
        raise RuntimeError(f"{len(found)} networks were trained, not 2: {done.stdout[-1500:]}")
    return {summary["recipe"]: summary for summary in found}
