"""Ranks on the GPU of one machine: NCCL with one rank, gloo with two, a group of eight in name.

NCCL wants a GPU for each rank: more than one is for a machine with several.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu
PROGRAM = Path(__file__).parents[1] / "programs" / "gpu_ranks.py"


def run(backend: str, device: torch.device, ranks: int, compiled: bool) -> list[dict[str, Any]]:
    """What each rank printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    started = [
        subprocess.Popen(
            [sys.executable, PROGRAM, backend, str(device)],
            env={**os.environ, **group, "RANK": str(rank), "COMPILED": str(int(compiled))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    told = [process.communicate(timeout=240) for process in started]
    for process, (out, error) in zip(started, told, strict=True):
        assert process.returncode == 0, out[-1000:] + error[-3000:]
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in told]


@pytest.mark.parametrize(
    ("backend", "ranks", "compiled"), [("nccl", 1, True), ("gloo", 2, False)], ids=str
)
def test_ranks_train_alike(backend: str, ranks: int, compiled: bool, device: torch.device) -> None:
    """DDP hands the same weights to all; compiled, its step is captured where the device can."""
    if device.type == "cpu":
        backend = "gloo"
    found = run(backend, device, ranks, compiled)
    for rank in found:
        assert rank["same"]
        assert rank["skipped"] == 0
        assert rank["rows"] == 16 // ranks
        assert rank["loss"] == found[0]["loss"]


def test_one_of_eight_ranks_needs_no_more_memory_than_a_run_of_its_own(
    device: torch.device,
) -> None:
    """Its share of a batch, and DDP's buckets in place of the gradients."""
    (alone,) = run("nccl" if device.type == "cuda" else "gloo", device, 1, False)
    (one,) = run("fake", device, 1, False)
    assert one["size"] == 8
    assert one["rows"] == 2
    assert one["peak"] <= alone["peak"]
