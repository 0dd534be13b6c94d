"""Losses that compare samples give on two ranks what one process gives; the banks stay alike."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

RELATIONS = ["sp", "pkt", "cc", "rkd"]


@pytest.fixture(scope="module")
def found(
    program: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    target = tmp_path_factory.mktemp("ranks") / "found.pt"
    program("relations_on_ranks.py", target)
    return torch.load(target)


def assert_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Same gradient in every step, same loss, same parameters and banks of the term."""
    scale = other["gradients"].abs().amax(dim=1, keepdim=True)
    assert (scale > 0).all()
    torch.testing.assert_close(
        one["gradients"] / scale, other["gradients"] / scale, rtol=0, atol=2e-5
    )
    assert one["loss"] == pytest.approx(other["loss"], rel=2e-5)
    for name, value in other["state"].items():
        torch.testing.assert_close(one["state"][name], value, rtol=1e-4, atol=1e-6)


# Joined: every rank compares the rows of both. Apart: its own, and the mean over the ranks is
# taken, weighted by their rows; one process does that with two micro-batches.
@pytest.mark.parametrize(
    "case",
    [f"{name}, {how}" for name in RELATIONS for how in ("joined", "apart")]
    + ["cc, joined, accumulated"],
)
def test_relations(found: dict[str, Any], case: str) -> None:
    (whole,), (first, second) = ([f[case] for f in found[k]] for k in ("one", "two"))
    assert whole["gradients"].shape[0] == 4
    assert first["same"]
    assert torch.equal(first["gradients"], second["gradients"])
    assert_alike(first, whole)


@pytest.mark.parametrize("name", RELATIONS)
def test_joined_is_not_apart(found: dict[str, Any], name: str) -> None:
    joined, apart = (found["two"][0][f"{name}, {how}"] for how in ("joined", "apart"))
    assert joined["loss"] != pytest.approx(apart["loss"], rel=1e-3)


@pytest.mark.parametrize("case", ["crd", "crd, repeated ids"])
def test_crd_banks_and_normalizer_are_those_of_one_process(
    found: dict[str, Any], case: str
) -> None:
    (whole,), (first, second) = ([f[case] for f in found[k]] for k in ("one", "two"))
    assert first["same"]
    assert torch.equal(first["gradients"], second["gradients"])
    assert_alike(first, whole)
    norms = first["state"]["student_MD"].norm(dim=1)
    moved = int(((norms - 1).abs() < 1e-5).sum())
    # With repeated ids one sample of each of the three batches keeps its row.
    assert moved == (57 if case == "crd" else 48 - 3)
    assert (first["state"]["normalizer_2"] > 0).all()


def test_a_nan_on_one_rank_leaves_the_banks_of_both(found: dict[str, Any]) -> None:
    for rank in (f["crd, poisoned"] for f in found["two"]):
        first, second, third, _ = rank["states"]
        assert [name for name in first if not torch.equal(first[name], second[name])] == []
        assert not torch.equal(second["terms.0.student_MD"], third["terms.0.student_MD"])
        assert rank["same"]


def test_the_exchange_between_ranks_compiles(found: dict[str, Any]) -> None:
    for graph, plain in ((f["compiled"], f["eager"]) for f in found["two"]):
        assert graph["same"]
        assert_alike(graph, plain)
