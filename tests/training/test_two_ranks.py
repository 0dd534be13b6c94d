"""Two ranks over gloo do what one process does: same views, same gradients, same decisions.

programs/two_ranks.py looks at trainers from inside, programs/killed_runs.py kills, stops and
resumes whole runs; here their findings are judged. torchrun itself starts one run.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastkd.data.loaders.plan import BatchPlan
from fastkd.storage.weights import load_weights

# Where the resumed ranks go on: (epoch, step), both from 0.
RESUMED_AT = {
    "two ranks, before step 3": (0, 3),
    "two ranks, before step 6": (1, 2),
    "picked on two ranks, before step 6": (1, 2),
    "second views on two ranks, before step 6": (1, 2),
    "two ranks, inside save 2": (0, 2),
    "two ranks, stopped in step 1": (0, 2),
    "two ranks, stopped in step 3": (1, 0),
}


@pytest.fixture(scope="module")
def inside(
    program: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    target = tmp_path_factory.mktemp("inside") / "found.pt"
    program("two_ranks.py", target)
    return torch.load(target)


@pytest.fixture(scope="module")
def runs(
    killed_runs: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    return killed_runs(folder, *RESUMED_AT, "headless on two ranks")


@pytest.mark.parametrize(
    "case", ["gradients", "gradients, accumulated", "gradients, mixed targets"]
)
def test_gradients_are_those_of_one_process(inside: dict[str, Any], case: str) -> None:
    (whole,), (first, second) = ([found[case] for found in inside[k]] for k in ("one", "two"))
    assert torch.equal(first["gradients"], second["gradients"])
    # Batches of 16, 16, 16 and 9: the last has 5 and 4 images on the two ranks.
    assert whole["gradients"].shape[0] == 4
    for step in range(4):
        torch.testing.assert_close(
            first["gradients"][step], whole["gradients"][step], rtol=1e-5, atol=1e-7
        )
    assert first["loss"] == second["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_accumulation_changes_no_gradient(inside: dict[str, Any]) -> None:
    (found,) = inside["one"]
    torch.testing.assert_close(
        found["gradients, accumulated"]["gradients"],
        found["gradients"]["gradients"],
        rtol=1e-5,
        atol=1e-7,
    )


# A quarter, rounded up, of 16 images on each of two ranks, in the last batch of 10 and of 8; in one
# process of 32 and of 18.
CHOSEN: dict[str, dict[str, list[tuple[int, ...]]]] = {
    "picked": {"one": [(8,)] * 3 + [(5,)], "two": [(4, 4)] * 3 + [(3, 2)]},
    "picked, accumulated": {
        "one": [(4,), (4,)] * 3 + [(3,), (2,)],
        "two": [(2, 2), (2, 2)] * 3 + [(2, 1), (1, 1)],
    },
}


@pytest.mark.parametrize("case", CHOSEN)
def test_rows_that_were_picked_are_joined_over_the_ranks(inside: dict[str, Any], case: str) -> None:
    for world, expected in CHOSEN[case].items():
        for rank, found in enumerate(each[case] for each in inside[world]):
            assert found["rows"] == [(rows, rows[rank]) for rows in expected]
            assert found["loss"] > 0
            assert found["same"]


def test_a_nan_on_one_rank_leaves_everything_on_both_ranks(inside: dict[str, Any]) -> None:
    for found in (found["bad step"] for found in inside["two"]):
        first, second, third, _ = found["states"]
        assert any(name.startswith("moment") for name in first)
        assert any(name.startswith("ema.") for name in first)
        assert [name for name in first if not torch.equal(first[name], second[name])] == []
        assert not torch.equal(second["student.model.fc.weight"], third["student.model.fc.weight"])
        assert found["counts"] == (0, 1)
        assert found["skipped"] == 1
        assert found["same"]


def test_every_validation_image_counts_once(inside: dict[str, Any]) -> None:
    first, second = (found["learning"] for found in inside["two"])
    epochs = len(first["found"])
    assert epochs == 6
    assert sorted(first["evaluated"] + second["evaluated"]) == sorted([*range(49)] * epochs)
    assert first["found"] == second["found"]
    assert {found["samples"] for found in first["found"]} == {49}


def test_ranks_learn_as_one_process_does(inside: dict[str, Any]) -> None:
    (whole,), (first, second) = ([found["learning"] for found in inside[k]] for k in ("one", "two"))
    assert first["same"]
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    reached = [found["found"][-1]["accuracy"] for found in (whole, first)]
    assert min(reached) > 0.9  # chance is 0.1
    assert abs(reached[0] - reached[1]) <= 4 / 49


def test_distill_on_ranks_is_distill_in_one_process(inside: dict[str, Any]) -> None:
    (whole,), (first, second) = ([found["foreign"] for found in inside[k]] for k in ("one", "two"))
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
        torch.testing.assert_close(value, whole["state"][name], rtol=1e-4, atol=1e-6)
    for one, other in zip(first["history"], whole["history"], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


def batches_of(rank: int, *, first: int, num: int = 57, ranks: int = 2) -> list[list[Any]]:
    """What a rank reads from step `first` of 8 on: its own ids, not those of partners."""
    plan = BatchPlan("tiny", num, 16, 0, train=True, drop_last=False, rank=rank, world_size=ranks)
    steps = (divmod(number, 4) for number in range(first, 8))
    return [[epoch, plan.order(epoch)[plan.part(step)].tolist()] for epoch, step in steps]


@pytest.mark.parametrize("name", RESUMED_AT)
def test_ranks_that_ended_early_end_bit_identical(runs: dict[str, Any], name: str) -> None:
    found = runs[name]
    epoch, step = RESUMED_AT[name]
    assert found["codes"][1] == [0, 0], found["log"]
    line = f"resumed tiny/kd at epoch {epoch + 1} of 2, step {step} of 4"
    assert found["log"].count(line) == 1
    assert found["different"] == []
    assert found["states"][0] == found["states"][1]
    for rank in range(2):
        assert found["fetched"][rank] == batches_of(rank, first=4 * epoch + step)


def test_both_ranks_were_killed(runs: dict[str, Any]) -> None:
    assert runs["two ranks, before step 3"]["codes"][0] == [-9, -9]
    # Rank 0 dies inside its save; the other one loses its partner, as with torchrun.
    first, second = runs["two ranks, inside save 2"]["codes"][0]
    assert (first, second > 0) == (-9, True)


def test_ranks_stop_together_and_say_so_once(runs: dict[str, Any]) -> None:
    # Only rank 1 got the SIGTERM.
    found = runs["two ranks, stopped in step 1"]
    assert found["codes"][0] == [143, 143]
    assert found["first_log"].count("stopped at epoch 1, step 2; the state is saved.") == 1
    # Asked in the last step of an epoch, they finish the epoch first.
    found = runs["two ranks, stopped in step 3"]
    assert found["codes"][0] == [130, 130]
    assert found["first_log"].count("stopped at epoch 2, step 0; the state is saved.") == 1


def test_a_student_whose_head_has_no_loss_trains_on_ranks(runs: dict[str, Any]) -> None:
    found = runs["headless on two ranks"]
    assert found["codes"] == [[0, 0]], found["log"]
    assert found["states"][0] == found["states"][1]
    assert found["different"] == []  # from a second run of the same recipe


@pytest.mark.parametrize("num", [2, 3])
def test_views_are_those_of_one_process(ranks: Callable[..., Any], num: int) -> None:
    ranks(num, "partners_on_ranks.py", timeout=120)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def recipe(folder: Path, **changes: Any) -> list[str]:
    values: dict[str, Any] = {
        **{"name": "tiny/ce", "epochs": 2, "batch_size": 16, "compile": "off", "device": "cpu"},
        "data": {"name": "synthetic", "image_size": 8, "train_limit": 60},
        "student": {"name": "resnet8", "width": 0.5},
        "losses": {"ce": {"weight": 1.0}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values | changes))
    return [*TORCHRUN, "-m", "fastkd.train", "--config", "recipe.yaml"]


def test_torchrun_trains(program: Callable[..., Any], tmp_path: Path) -> None:
    said = program(*recipe(tmp_path), "out=run", cwd=tmp_path)
    assert said.out.count("run folder run\n") == 1
    assert said.out.count("tiny/ce  epoch 2/2") == 1
    tensors, facts = load_weights(tmp_path / "run")
    assert facts["architecture"] == "resnet8"
    assert tensors["fc.weight"].shape == (10, 32)


def test_more_processes_than_images_is_one_sentence(inside: dict[str, Any]) -> None:
    found = inside["too many"]
    assert found["codes"] == [2, 2, 2]
    sentence = "3 processes, but synthetic/train has 2 images; start at most one process per image"
    assert found["log"] == f"fastkd: {sentence}\n"
    assert not found["left"]


def test_what_only_one_rank_meets_it_says_itself(inside: dict[str, Any]) -> None:
    found = inside["damaged"]
    assert found["codes"] == [1, 2], found["log"]
    said = found["log"].splitlines()
    assert [line for line in said if found["broken"] in line and line.startswith("fastkd: ")]
    assert any(line.startswith("fastkd: another process of this run has ended") for line in said)
    assert "Traceback" not in found["log"]


@pytest.mark.slow
def test_ctrl_c_in_torchrun_saves_and_the_run_goes_on(
    start: Callable[..., subprocess.Popen[str]], program: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = [*recipe(tmp_path, epochs=60), "out=run"]
    run = start(*arguments, cwd=tmp_path, own_group=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "last.pt").exists():
        assert time.monotonic() < deadline
        assert run.poll() is None, run.communicate()
        time.sleep(0.2)
    # As a terminal does: to torchrun and its processes at once, and torchrun passes it on again.
    os.killpg(run.pid, signal.SIGINT)
    _, complaints = run.communicate(timeout=120)
    stopped = re.findall(r"stopped at epoch (\d+), step (\d+); the state is saved.", complaints)
    assert len(stopped) == 1
    assert "Resume it with: fastkd train --resume run" in complaints
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    progress = state["progress"]
    assert (progress["epoch"] + 1, progress["step"]) == tuple(map(int, stopped[0]))
    said = program(*arguments, "--resume", "auto", cwd=tmp_path)
    assert f"resumed tiny/ce at epoch {stopped[0][0]} of 60" in said.out
