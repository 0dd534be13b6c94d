"""Two stages in one run: the encoder first, then the network that starts from it; killed, resumed.

The processes that end early are children of programs/killed_runs.py: six trainings of three steps,
of the teacher, the student alone and the distilled one, each with its encoder before it.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd.runs.one_stage
from fastkd.recipes.loading import load_recipe
from fastkd.storage.weights import load_weights
from fastkd.testing.label_maps import write_pairs

WORDS = (
    "quickstart",
    "data={name: pairs, root: pairs, image_size: 16, drop_last: false}",
    "batch_size=4",
    "epochs=2",
    "encoder.epochs=1",
    "student={name: erfnet, block: G:N}",
    "teacher={name: erfnet, train: true, epochs: 1, min_accuracy: 0}",
    "baseline.lrs=0.001",
    "optim={name: adam, lr: 0.001, schedule: poly}",
    "losses.kd.ce_weight=0",
    "losses.ce.weight=1",
    "losses.at={weight: 600, pairs: {stage1: stage1, stage3: stage3, stage5: stage5}}",
    "precision=fp32",
    "compile=off",
    "device=cpu",
)

STAGES = [
    "teacher/pairs/erfnet/encoder",
    "teacher/pairs/erfnet",
    "quickstart/alone-lr0.001/encoder",
    "quickstart/alone-lr0.001",
    "quickstart/encoder",
    "quickstart",
]
# Step of all six trainings before which a run dies; what was resumed, and at which of its 3 steps.
RESUMED_AT = {
    1: ("teacher/pairs/erfnet/encoder", 1),
    4: ("teacher/pairs/erfnet", 1),
    7: ("tiny/kd/alone-lr0.001/encoder", 1),
    10: ("tiny/kd/alone-lr0.001", 1),
    14: ("tiny/kd/encoder", 2),
    17: ("tiny/kd", 2),
}


class Whole:
    """A run to its end, and the state of every network when its training was built."""

    def __init__(self, folder: Path) -> None:
        (teacher,) = (folder / "runs" / "teachers").iterdir()
        (self.run,) = (folder / "runs" / "quickstart").iterdir()
        self.folders = dict(
            zip(
                STAGES,
                [
                    teacher / "encoder",
                    teacher,
                    self.run / "alone" / "lr-0.001" / "encoder",
                    self.run / "alone" / "lr-0.001",
                    self.run / "encoder",
                    self.run,
                ],
                strict=True,
            )
        )
        self.starts: dict[str, dict[str, Tensor]] = {}
        self.said = ""
        self.opened = 0

    def summary(self) -> dict[str, Any]:
        return json.loads((self.run / "summary.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """One run for all tests of this module."""
    import os
    from contextlib import chdir, redirect_stdout
    from io import StringIO

    from fastkd.cli.commands import main

    folder = tmp_path_factory.mktemp("whole")
    write_pairs(folder / "pairs")
    starts: dict[str, dict[str, Tensor]] = {}
    original = fastkd.runs.one_stage.build_trainer

    def noting(plan: Any, *, student: Any, output: Any, **rest: Any) -> Any:
        if output.folder is not None:
            state = {key: value.clone() for key, value in student.state_dict().items()}
            starts[plan.stage] = state
        return original(plan, student=student, output=output, **rest)

    opened: list[int] = []
    opening = fastkd.runs.one_stage.open_data

    def counting(*args: Any, **more: Any) -> Any:
        opened.append(1)
        return opening(*args, **more)

    said = StringIO()
    with pytest.MonkeyPatch.context() as patch, chdir(folder), redirect_stdout(said):
        patch.setattr(fastkd.runs.one_stage, "build_trainer", noting)
        patch.setattr(fastkd.runs.one_stage, "open_data", counting)
        patch.setitem(os.environ, "FASTKD_CACHE", str(folder / "cache"))
        assert main(["train", *WORDS]) == 0
    found = Whole(folder)
    found.starts, found.said, found.opened = starts, said.getvalue(), len(opened)
    return found


def test_all_trainings_share_the_opened_data(whole: Whole) -> None:
    assert whole.opened == 1


def test_every_training_is_in_its_folder(whole: Whole) -> None:
    assert list(whole.starts) == STAGES
    for name, folder in whole.folders.items():
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["recipe"] == name
        assert (folder / "config.yaml").exists()
        lesson = load_recipe(None, config=folder / "config.yaml")
        assert lesson.digest() == summary["digest"]
    assert [
        len(json.loads((f / "summary.json").read_text())["history"])
        for f in (whole.folders["quickstart/encoder"], whole.run)
    ] == [1, 2]


@pytest.mark.parametrize("name", STAGES[1::2])
def test_the_second_stage_starts_from_the_first(whole: Whole, name: str) -> None:
    """Bit for bit, from its best epoch; decoder and head are those of a new network."""
    kept, _ = load_weights(whole.folders[name] / "encoder")
    start = whole.starts[name]
    new = ("head.", *(f"layers.{number}." for number in range(16, 22)))
    assert {key for key in start if not key.startswith(new)} == {
        key for key in kept if not key.startswith("head.")
    }
    for key, value in start.items():
        if not key.startswith(new):
            assert torch.equal(value, kept[key]), key
    recipe = load_recipe(None, config=whole.folders[name] / "config.yaml")
    torch.manual_seed(recipe.seed)
    fresh = fastkd.create_model("erfnet", 3, **recipe.student.options()).state_dict()
    assert all(torch.equal(start[key], fresh[key]) for key in start if key.startswith(new))


def test_a_summary_has_both_stages(whole: Whole) -> None:
    summary = whole.summary()
    both = (summary, summary["alone"], summary["teacher"]["training"])
    for one in both:
        assert one["student"] == "erfnet"
        assert one["encoder"]["student"] == "erfnet_encoder"
        assert 0 <= one["encoder"]["miou_best"] <= 1
    distilled, alone = summary["encoder"]["history"][0], summary["alone"]["encoder"]["history"][0]
    # The encoder is taught as well, at the taps that it has.
    assert {"train_at", "train_kd", "train_ce"} <= distilled.keys()
    assert "train_at" not in alone
    assert re.search(
        r"student erfnet: \d+ of \d+ tensors from .*encoder; new: head \(3", whole.said
    )


def test_a_dry_run_projects_both_stages(command: Callable[..., Any], tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs")
    said = command("train", "--dry-run", *WORDS)
    assert said.code == 0, said.err
    projected = re.search(r"projected duration +(.*)\n", said.out)
    assert projected is not None
    for name in ("teacher erfnet", "student alone (1 runs)", "student"):
        assert f"encoder of {name} " in projected[1]
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


@pytest.mark.matrix
def test_a_teacher_and_its_encoder_are_found_again(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    write_pairs(tmp_path / "pairs")
    alone = [word for word in WORDS if not word.startswith("baseline")]
    first = command("train", *alone, "baseline.lrs=")
    again = command("train", *alone, "baseline.lrs=", "seed=1", "teacher.seed=0")
    assert (first.code, again.code) == (0, 0), first.err + again.err
    assert "teacher/pairs/erfnet: finished before" in again.out
    assert "erfnet/encoder" not in again.out.replace("quickstart/encoder", "")


def test_a_mistake_of_the_first_stage_is_found_before_anything_is_written(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    write_pairs(tmp_path / "pairs")
    said = command("train", *WORDS, "losses.reviewkd.weight=1")
    assert said.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


def check_resumed(found: dict[str, Any], step: int) -> None:
    stage, at = RESUMED_AT[step]
    assert found["codes"] == [[-9], [0]], found["log"]
    assert f"resumed {stage} at epoch 1 of 1, step {at} of 3" in found["log"]
    assert found["different"] == []


@pytest.mark.matrix
def test_a_run_that_is_killed_in_any_stage_ends_bit_identical(
    killed_runs: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    names = {f"two stages, before step {step}": step for step in RESUMED_AT}
    found = killed_runs(tmp_path / "killed", *names)
    for name, step in names.items():
        check_resumed(found[name], step)


@pytest.mark.matrix
def test_a_run_that_is_killed_in_both_stages_ends_bit_identical(
    killed_runs: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    found = killed_runs(tmp_path / "killed", "two stages, twice")["two stages, twice"]
    assert found["codes"] == [[-9], [-9], [0]], found["log"]
    assert "tiny/kd/encoder: finished before" in found["log"]
    assert "resumed tiny/kd at epoch 1 of 1, step 1 of 3" in found["log"]
    assert found["different"] == []


@pytest.mark.matrix
def test_two_ranks_end_equal_and_are_resumed(
    killed_runs: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    name = "two stages on two ranks, before step 16"
    found = killed_runs(tmp_path / "two", name)[name]
    assert found["codes"] == [[-9, -9], [0, 0]], found["log"]
    assert "resumed tiny/kd at epoch 1 of 1, step 1 of 3" in found["log"]
    first, second = found["states"]
    assert first == second
    assert found["different"] == []
