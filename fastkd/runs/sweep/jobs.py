"""Runs of a sweep in parallel, each in its own process; `running` decides which.

Every process is `fastkd train --config FILE --resume auto` with one GPU, or with its share of the
threads, and writes its output to a log next to the run folders.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fastkd.errors import Interrupted, UserError
from fastkd.recipe.printing import recipe_to_yaml
from fastkd.recipe.schema import Recipe
from fastkd.runs.stages import Session
from fastkd.storage.atomic import writing
from fastkd.training.interrupt import StopSignal

__all__ = ["HOW_TO_RESUME", "environments", "run_jobs"]

HOW_TO_RESUME = "run the same command again to resume the whole sweep"
_LOOK_AGAIN_S = 0.2


@dataclass(frozen=True)
class _Job:
    name: str
    place: int
    log: Path
    process: subprocess.Popen[bytes]

    def last_line(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def run_jobs(recipes: Mapping[str, Recipe], session: Session, jobs: int) -> None:
    """Run every recipe, `jobs` at a time. A run that fails does not stop the others.

    recipes: by their printed name.

    Raises:
        UserError: more jobs than GPUs, or the first mistake that a process found.
        Interrupted: Ctrl-C, SIGTERM or a closed terminal, after all processes have ended.
    """
    jobs = min(jobs, len(recipes))
    places = environments(session.world.device, jobs)
    free, waiting = list(range(jobs)), dict(recipes)
    running: list[_Job] = []
    with tempfile.TemporaryDirectory() as configs, StopSignal() as stop:
        try:
            while (waiting or running) and not stop.code:
                while waiting and free:
                    name = next(iter(waiting))
                    place = free.pop(0)
                    job = _start(name, waiting.pop(name), session, place, places[place], configs)
                    session.console.note(f"{name}, job {place + 1}, {job.log}")
                    running.append(job)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    free.append(job.place)
                    code = job.process.returncode
                    said = job.last_line().removeprefix("fastkd: ")
                    if code == UserError.exit_code:
                        raise UserError(f"{job.name}: {said}")
                    ended = f"failed (exit code {code}): {said}" if code else "done"
                    session.console.note(f"{job.name}: {ended}")
                time.sleep(_LOOK_AGAIN_S)
        finally:
            # They save their state, as with Ctrl-C.
            for job in running:
                job.process.send_signal(signal.SIGINT)
            for job in running:
                job.process.wait()
    if stop.code:
        raise Interrupted(f"stopped with {len(running)} runs under way; {HOW_TO_RESUME}", stop.code)


def _start(
    name: str, recipe: Recipe, session: Session, place: int, own: dict[str, str], configs: str
) -> _Job:
    digest = recipe.digest()[:8]
    config = Path(configs) / f"{digest}.yaml"
    config.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    log = session.root / recipe.name / f"sweep-{digest}.log"
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
    command = [sys.executable, "-m", "fastkd.train", "--config", str(config), "--resume", "auto"]
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            # Ctrl-C on the terminal reaches this process only, which passes it on once.
            start_new_session=True,
        )
    return _Job(name, place, log, process)


def environments(device: torch.device, jobs: int) -> list[dict[str, str]]:
    """Environment variables of each job: its share of the threads, and a GPU."""
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    if device.type == "cpu":
        return [threads] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
    if jobs > len(gpus):
        raise UserError(f"--jobs={jobs}: this machine shows {len(gpus)} GPUs, one for each job")
    return [threads | {"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:jobs]]
