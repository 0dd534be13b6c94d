"""Other people's networks and loaders on two ranks: as in one process, or refused in words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, ranks: Callable[..., Any], program: Callable[..., Any]
) -> dict[str, list[dict[str, Any]]]:
    """What every case left in one process, and on each of two ranks."""
    folder: Path = tmp_path_factory.mktemp("others")
    program("others_on_ranks.py", folder / "one")
    ranks(2, "others_on_ranks.py", folder / "two", timeout=90)
    names = {"one": ["one.0"], "two": ["two.0", "two.1"]}
    return {key: [torch.load(folder / name) for name in files] for key, files in names.items()}


@pytest.mark.parametrize("case", ["idle", "idle, alone", "reentrant"])
def test_ranks_do_as_one_process_does(found: dict[str, Any], case: str) -> None:
    """Layers that nothing uses stay as they were, untouched by weight decay."""
    (whole,), (first, second) = ([one[case] for one in found[key]] for key in ("one", "two"))
    assert first["skipped"] == 0 and len(first["loss"]) == 3
    for name, value in whole["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-6)
    assert first["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_ranks_that_skip_different_layers_stay_alike(found: dict[str, Any]) -> None:
    first, second = (one["dropped"] for one in found["two"])
    assert first["skipped"] == 0 and len(first["loss"]) == 3
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("dropped together", "UserError: the loss sp uses a tap that is skipped at random in tr"),
        ("lengths", "UserError: the processes have loaders of different lengths ([2, 1] batches)"),
        ("ends early", "UserError: the processes have different numbers of batches in an epoch"),
        ("one over", "UserError: the processes have batches of different sizes ("),
        ("several on one rank", "UserError: the loss ce"),
        ("labels on none", "RunFailed: nothing was learned in epoch 1: none of its images has a"),
        ("validation on none", "UserError: the images of val_loader have no label (all are -100)"),
    ],
)
def test_what_ranks_cannot_do_both_say(found: dict[str, Any], case: str, said: str) -> None:
    for one in found["two"]:
        assert one[case]["said"].startswith(said)


@pytest.mark.parametrize("case", ["labels on one rank", "validation on one rank"])
def test_labels_on_one_rank_are_enough(found: dict[str, Any], case: str) -> None:
    for one in found["two"]:
        assert one[case]["skipped"] == 0 and len(one[case]["loss"]) == 3


def test_ranks_agree_on_what_one_of_them_sees(found: dict[str, Any]) -> None:
    for one in found["two"]:
        assert one["several in validation"]["measured"] == ["map_last"]
        assert one["fp32 on one rank"]["precision"] == "fp32"
        assert one["fp32 on one rank"]["skipped"] == 0


def test_one_process_skips_a_tap_and_goes_on(found: dict[str, Any]) -> None:
    assert found["one"][0]["dropped together"]["skipped"] == 0
