"""Ranks on the GPU of one machine: NCCL with one rank, gloo with two, a group of eight in name.

NCCL wants a GPU for each rank: more than one is for a machine with several.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture
def run(ranks: Callable[..., list[Any]]) -> Callable[..., list[dict[str, Any]]]:
    """What each rank printed."""

    def run(backend: str, device: torch.device, num: int, compiled: bool) -> list[dict[str, Any]]:
        # All ranks on the one GPU.
        place = {"LOCAL_RANK": "0", "COMPILED": str(int(compiled))}
        told = ranks(num, "gpu_ranks.py", backend, str(device), **place)
        return [json.loads(said.out.strip().splitlines()[-1]) for said in told]

    return run


@pytest.mark.parametrize(
    ("backend", "num", "compiled"), [("nccl", 1, True), ("gloo", 2, False)], ids=str
)
def test_ranks_train_alike(
    run: Callable[..., list[dict[str, Any]]],
    backend: str,
    num: int,
    compiled: bool,
    device: torch.device,
) -> None:
    """DDP hands the same weights to all; compiled, its step is captured where the device can."""
    if device.type == "cpu":
        backend = "gloo"
    found = run(backend, device, num, compiled)
    for rank in found:
        assert rank["same"]
        assert rank["skipped"] == 0
        assert rank["rows"] == 16 // num
        assert rank["loss"] == found[0]["loss"]


def test_one_of_eight_ranks_needs_no_more_memory_than_a_run_of_its_own(
    run: Callable[..., list[dict[str, Any]]],
    device: torch.device,
) -> None:
    """Its share of a batch, and DDP's buckets in place of the gradients."""
    (alone,) = run("nccl" if device.type == "cuda" else "gloo", device, 1, False)
    (one,) = run("fake", device, 1, False)
    assert one["size"] == 8
    assert one["rows"] == 2
    assert one["peak"] <= alone["peak"]
