"""Runs of a sweep side by side on this host (`--jobs`), each with a GPU or its share of threads."""

import os
from dataclasses import dataclass, field
from typing import Literal

import torch

from fastkd.errors import UserError
from fastkd.runs.sweep.process import End, Order, RunProcess

__all__ = ["LocalLauncher", "environments"]


@dataclass(frozen=True)
class _Job:
    place: int
    process: RunProcess

    @property
    def where(self) -> str:
        return f"job {self.place + 1}"

    def end(self) -> End | None:
        return self.process.end()

    def stop(self) -> None:
        self.process.stop()


@dataclass
class LocalLauncher:
    """`jobs` processes of this host at a time."""

    device: Literal["cpu", "cuda"]
    jobs: int
    look_again_s: float = 0.2
    _places: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    _running: list[_Job] = field(default_factory=list[_Job])

    def prepare(self, runs: int) -> int:
        """Divide the host; UserError for more jobs than GPUs."""
        self._places = environments(torch.device(self.device), min(self.jobs, runs))
        return len(self._places)

    def start(self, order: Order) -> _Job:
        """On the first free place."""
        self._running = [job for job in self._running if job.end() is None]
        taken = {job.place for job in self._running}
        place = next(place for place in range(len(self._places)) if place not in taken)
        job = _Job(place, RunProcess(order, self._places[place]))
        self._running.append(job)
        return job


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
