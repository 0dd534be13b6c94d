"""Losses under two ranks over gloo, with 5 and 4 samples: what reaches the student and the modules.

Losses that are means over rows, and DIST with gather=True, give what one process gives on the
joined batch; DIST with gather=False, losses with batch norms of their own, means weighted by class
and masks drawn on every rank the mean over ranks.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

JOINED = [
    "ce",
    "bce",
    "kd",
    "kd_standardized",
    "soft_ce",
    "dkd",
    "dist",
    "at",
    "nst",
    "vid",
    "stage_mse",
    "jointrd",
    "discriminator",
    "ab",
    "fsp",
    "cwd",
    "cwd_connected",
]
APART = [
    "dist_apart",
    "fitnet",
    "ft",
    "ab_connected",
    "reviewkd",
    "simkd",
    "jointrd_released",
    "ce_weighted",
    "cwd_released",
    "mgd",
]


@pytest.fixture(scope="module")
def found(program: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    target = tmp_path_factory.mktemp("ranks") / "found.pt"
    program("terms_on_ranks.py", target)
    return torch.load(target)


def together(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What DDP makes of the ranks: rows side by side, gradients of parameters added."""
    return {
        "loss": sum(rank["loss"] for rank in ranks),
        "rows": [torch.cat(parts) for parts in zip(*(rank["rows"] for rank in ranks), strict=True)],
        "own": [sum(parts) for parts in zip(*(rank["own"] for rank in ranks), strict=True)],
    }


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    # The plain cross entropy is computed in fp32 whatever its logits.
    exact = other["loss"].dtype == torch.float64
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if exact else {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(one, other, **tolerance)
    assert all(gradient.abs().sum() > 0 for gradient in one["rows"])


@pytest.mark.parametrize("name", JOINED)
def test_two_ranks_are_one_process_on_the_joined_batch(found: dict[str, Any], name: str) -> None:
    assert_equal(together([rank[name] for rank in found["two"]]), found["one"][0][name]["joined"])


@pytest.mark.parametrize("name", APART)
def test_two_ranks_are_the_mean_over_ranks(found: dict[str, Any], name: str) -> None:
    assert_equal(
        together([rank[name] for rank in found["two"]]), together(found["one"][0][name]["apart"])
    )


def test_the_two_readings_of_dist_differ(found: dict[str, Any]) -> None:
    dist = found["one"][0]["dist"]
    joined, apart = dist["joined"], together(dist["apart"])
    # By far more than the tolerance above.
    assert abs(joined["loss"] - apart["loss"]) > 1e-6 * joined["loss"]


def test_dist_over_ranks_is_one_graph(found: dict[str, Any]) -> None:
    for rank in found["two"]:
        torch.testing.assert_close(rank["dist compiled"], rank["dist"], rtol=1e-9, atol=1e-12)


def test_ranks_train_alike_with_all_losses(found: dict[str, Any]) -> None:
    first, second = (rank["training"] for rank in found["two"])
    assert first["same"]
    assert second["same"]
    assert first["skipped"] == 0
    for row, other in zip(first["history"], second["history"], strict=True):
        losses = {key: value for key, value in row.items() if key.startswith("train_")}
        assert all(math.isfinite(value) for value in losses.values())
        assert losses == {key: other[key] for key in losses}
    assert len(first["history"]) == 2
