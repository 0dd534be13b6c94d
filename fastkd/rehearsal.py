"""What a run would cost, from a few steps that are thrown away; behind `--dry-run`."""

import resource
import time
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import torch

from fastkd.step import Prepared
from fastkd.trainer import Trainer

__all__ = ["rehearse"]


def rehearse(trainer: Trainer, steps: int = 2) -> dict[str, Any]:
    """Seconds of the first and the last step, peak memory, shapes of views and teacher tensors."""
    trainer.runner.train()
    clocks, shapes = [time.perf_counter()], {}
    for prepared in islice(_batches(trainer), steps):
        trainer.optimize(prepared, 0, 0)
        trainer.totals_M.tolist()  # waits for the device
        clocks.append(time.perf_counter())
        tensors = prepared.views | prepared.teacher
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return {
        "first_step_seconds": clocks[1] - clocks[0],
        "seconds_per_step": clocks[-1] - clocks[-2],
        "peak_memory_MiB": _peak_memory_mib(trainer.world.device),
        "shapes": shapes,
    }


def _batches(trainer: Trainer) -> Iterator[Prepared]:
    for epoch in count():
        yield from trainer.prepare(epoch)


def _peak_memory_mib(device: torch.device) -> float:
    """Most memory held so far: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
