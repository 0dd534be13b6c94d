"""`report.record`: no bit of the training changes, every epoch is kept once, the numbers are true.

The truth is numpy on saved weights, and KL and distances in float64 from plain forward passes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import fastkd.data.sources.synthetic
from fastkd.errors import UserError
from fastkd.models.registry import model_from_file
from fastkd.output.run_folder import RunFolder
from fastkd.recipes.loading import load_recipe
from fastkd.report.runs_read import read_run
from fastkd.storage.weights import load_weights
from fastkd.testing.recipes import TINY, TINY_QUICKSTART
from fastkd.training.recording import recorder
from fastkd.training.recording.divergence import Divergence
from fastkd.training.recording.step_clock import PARTS, StepClock
from fastkd.training.recording.weights import BINS, layers_of
from fastkd.training.trainer import Trainer

NAMES = ("weights", "kl", "samples", "alignment", "time")
RECORD = f"report.record={','.join(NAMES)}"
# Five steps an epoch: the recordings see four of them. Stages as wide as the teacher's.
KEYS = (
    *TINY_QUICKSTART,
    "data.train_limit=40",
    "batch_size=8",
    "student.width=2",
    "teacher.epochs=1",
    "teacher.min_accuracy=0",
    "augment.xprime=cutmix",
    "losses.kd.views=x,xprime",
    "epochs=3",
)
ALONE = ("quickstart", *TINY, "teacher=null", "losses.kd=null", "losses.ce.weight=1")


@dataclass
class Shown:
    """What the recordings were given in a run, copied before they could touch it."""

    student: nn.Module
    view: str
    images_PCHW: torch.Tensor
    teacher_PC: torch.Tensor
    state: dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def _as_in_the_programs() -> Any:
    """Few validation images, and one thread: with more of them a sum may be rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fastkd.data.sources.synthetic.NUM_IMAGES, "val", 49)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three runs with one trained teacher: plain, recorded, recorded but stopped and resumed."""
    from fastkd.cli.commands import main

    folder = tmp_path_factory.mktemp("recorded")
    shown: list[Shown] = []
    weights: list[dict[str, torch.Tensor]] = []
    score, end = Divergence.before_update, Trainer.end_epoch

    def scoring(self: Divergence, prepared: Any) -> None:
        images, teacher = prepared.views[self.view], prepared.targets[self.key]
        state = {name: one.clone() for name, one in self.student.state_dict().items()}
        shown.append(Shown(self.student, self.view, images.clone(), teacher.clone(), state))
        score(self, prepared)
        after = self.student.state_dict()
        assert all(torch.equal(state[name], after[name]) for name in state)

    def ending(self: Trainer) -> None:
        before = {name: one.clone() for name, one in self.step.student.model.state_dict().items()}
        end(self)
        if self.recorder is not None:
            weights.append(before)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("FASTKD_CACHE", str(folder / "cache"))
        assert main(["train", *KEYS, "out=plain"]) == 0
        with pytest.MonkeyPatch.context() as spied:
            spied.setattr(Divergence, "before_update", scoring)
            spied.setattr(Trainer, "end_epoch", ending)
            assert main(["train", *KEYS, RECORD, "out=recorded"]) == 0
    return {"folder": folder, "shown": shown, "weights": weights}


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"record/{name}.jsonl").read_text().splitlines()]


def assert_equal_weights(one: Path, other: Path) -> None:
    left, right = (load_weights(run)[0] for run in (one, other))
    assert left and left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def last_states(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of last.pt by its path: weights, optimizer, averages, random numbers."""
    found: dict[str, torch.Tensor] = {}

    def walk(path: str, one: Any) -> None:
        if isinstance(one, torch.Tensor):
            found[path] = one
        elif isinstance(one, dict):
            for key, value in one.items():
                walk(f"{path}/{key}", value)
        elif isinstance(one, list | tuple):
            for index, value in enumerate(one):
                walk(f"{path}/{index}", value)

    walk("", torch.load(run / "last.pt", weights_only=True))
    return found


def test_no_bit_of_the_training_changes(trained: dict[str, Any]) -> None:
    plain, recorded = trained["folder"] / "plain", trained["folder"] / "recorded"
    assert_equal_weights(plain, recorded)
    one, other = last_states(plain), last_states(recorded)
    assert one.keys() == other.keys()
    assert len(one) > 20
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    timed = {"images_per_s", "data_wait", "seconds"}
    kept = [
        [{k: v for k, v in row.items() if k not in timed} for row in RunFolder(run).metrics()]
        for run in (plain, recorded)
    ]
    assert [row["train_loss"] for row in kept[0]] == [row["train_loss"] for row in kept[1]]
    assert [row["val_accuracy"] for row in kept[0]] == [row["val_accuracy"] for row in kept[1]]
    assert not (plain / "record").exists()


def test_every_name_keeps_every_epoch_once(trained: dict[str, Any]) -> None:
    run = trained["folder"] / "recorded"
    for name, first in (("weights", 0), ("kl", 1), ("alignment", 1), ("time", 1)):
        assert [row["epoch"] for row in rows(run, name)] == list(range(first, 4))
    files = {path.name for path in (run / "record").iterdir()}
    assert files == {
        *(f"{name}.jsonl" for name in NAMES if name != "samples"),
        "samples-epoch0003.npz",
    }


def test_weights_are_those_of_numpy(trained: dict[str, Any]) -> None:
    run = trained["folder"] / "recorded"
    found = rows(run, "weights")
    for row, state in zip(found[1:], trained["weights"], strict=True):
        for place in ("first", "middle", "last"):
            said = row[place]
            flat = state[f"{said['layer']}.weight"].numpy().ravel().astype(np.float64)
            ordered = np.sort(flat)
            assert (said["low"], said["high"]) == (ordered[0], ordered[-1])
            for percent, value in said["percentiles"].items():
                # Linear between the neighbours of rank p (n - 1).
                place_of = int(percent) / 100 * (len(ordered) - 1)
                low = int(place_of)
                rest = place_of - low
                true = ordered[low] * (1 - rest) + ordered[min(low + 1, len(flat) - 1)] * rest
                assert value == pytest.approx(true, abs=1e-12)
            assert len(said["counts"]) == BINS and sum(said["counts"]) == len(flat)
    layers = [found[0][place]["layer"] for place in ("first", "middle", "last")]
    modules = dict(model_from_file(run).named_modules())
    assert all(isinstance(modules[path], nn.Conv2d) for path in layers)
    assert len(set(layers)) == 3
    assert found[0]["first"]["percentiles"] != found[1]["first"]["percentiles"]


def test_the_mean_kl_is_that_of_float64(trained: dict[str, Any]) -> None:
    run = trained["folder"] / "recorded"
    shown: list[Shown] = trained["shown"]
    assert len(shown) == 3 * recorder.LAST_STEPS
    temperature = 4.0  # of the quickstart
    for epoch, row in enumerate(rows(run, "kl")):
        means, hard, ratios, images = [], [], [], 0
        for one in shown[4 * epoch : 4 * epoch + 4]:
            student = one.student
            student.load_state_dict(one.state)
            student.train()
            with torch.no_grad():
                logits_PC = student(one.images_PCHW).double()
            q_PC = (logits_PC / temperature).softmax(1)
            p_PC = (one.teacher_PC.double() / temperature).softmax(1)
            kl_P = (p_PC * (p_PC.log() - q_PC.log())).sum(1).numpy()
            half = np.sort(kl_P)[::-1][: -(-len(kl_P) // 2)]
            means.append(kl_P.mean())
            hard.append(half.mean())
            ratios.append(half.mean() / kl_P.mean())
            images += len(kl_P)
        assert row["view"] == shown[0].view == "xprime"
        assert row["images"] == images == 4 * 8
        assert row["temperature"] == temperature
        # Divergences near zero lose digits in fp32.
        close = {"rel": 1e-3, "abs": 1e-6}
        assert row["kl_all"] == pytest.approx(np.mean(means), **close)
        assert row["kl_hardest"] == pytest.approx(np.mean(hard), **close)
        assert row["ratio"] == pytest.approx(np.mean(ratios), rel=1e-3)


def test_samples_hold_probabilities_and_the_pixels(trained: dict[str, Any]) -> None:
    run = trained["folder"] / "recorded"
    found = read_run(run).recorded("samples")
    assert isinstance(found, dict) and list(found) == [3]
    arrays = found[3]
    # All of the last batch.
    assert arrays["images_SHWC"].shape == (8, 16, 16, 3)
    assert arrays["images_SHWC"].dtype == np.uint8
    assert int(arrays["counted"]) == 8
    last: Shown = trained["shown"][-1]
    teacher_PC = last.teacher_PC.double().softmax(1).numpy()
    for name in ("target", "teacher", "student"):
        shares = arrays[f"{name}_shares_SK"]
        assert shares.shape == (8, 5) and (np.diff(shares, axis=1) <= 0).all()
        assert (shares >= 0).all() and (shares.sum(1) <= 1 + 1e-6).all()
    # Each row is one of the batch's, by the teacher's answer.
    top_PK = np.sort(teacher_PC, axis=1)[:, ::-1][:, :5]
    for row in arrays["teacher_shares_SK"]:
        assert np.abs(top_PK - row).max(1).min() < 1e-5
    # A label of CutMix has two classes at most.
    assert ((arrays["target_shares_SK"] > 0).sum(1) <= 2).all()
    assert arrays["target_shares_SK"].sum(1) == pytest.approx(np.ones(8), abs=1e-6)
    differ = arrays["teacher_classes_SK"][:, 0] != arrays["target_classes_SK"][:, 0]
    assert float(arrays["disagreement"]) == pytest.approx(differ.mean())


def test_the_alignment_compares_stages_of_both(trained: dict[str, Any]) -> None:
    for row in rows(trained["folder"] / "recorded", "alignment"):
        assert list(row["mse"]) == list(row["relative"]) == ["stage1", "stage2", "stage3"]
        assert all(value > 0 for value in (*row["mse"].values(), *row["relative"].values()))


def test_time_names_the_parts_of_the_timed_steps(trained: dict[str, Any]) -> None:
    for row in rows(trained["folder"] / "recorded", "time"):
        assert row.pop("epoch") and row.pop("steps") == recorder.LAST_STEPS
        parts = [key.removesuffix("_ms") for key in row]
        assert parts == [part for part in PARTS if part not in ("pick", "forward")]
        assert all(value >= 0 for value in row.values())


def test_a_clock_that_times_nothing_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StepClock(torch.device("cpu"), first=2)
    ticks = iter(range(100))
    monkeypatch.setattr(clock, "_now", lambda: float(next(ticks)))
    for step in range(4):
        clock.turn(step)
        with clock.part("forward"):
            pass
        with clock.part("backward"), clock.part("optimizer"):
            pass
    # One tick of a second between two readings; two steps are timed, the outer part has three.
    assert clock.per_step_ms() == {"forward": 1000.0, "backward": 3000.0, "optimizer": 1000.0}
    assert clock.per_step_ms() == {}
    never = StepClock(torch.device("cpu"))
    never.turn(0)
    with never.part("forward"):
        pass
    assert never.per_step_ms() == {}


@pytest.fixture(scope="module")
def killed(trained: dict[str, Any], program: Any) -> Path:
    """Runs that were killed at the moments of the program, beside the others."""
    folder = trained["folder"]
    cache = str(folder / "cache")
    program("recorded_runs.py", folder, *KEYS, RECORD, FASTKD_CACHE=cache)
    return folder


@pytest.mark.parametrize("number", range(3))
def test_after_a_kill_every_epoch_is_there_once(
    killed: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastkd.cli.commands import main

    monkeypatch.chdir(killed)
    monkeypatch.setenv("FASTKD_CACHE", str(killed / "cache"))
    run, recorded = killed / f"killed-{number}", killed / "recorded"
    inside = number == 2
    # What is written of an epoch before its checkpoint would be there twice.
    assert [row["epoch"] for row in rows(run, "weights")] == ([0, 1] if inside else [0, 1, 2])
    assert main(["train", "--resume", str(run)]) == 0
    assert_equal_weights(recorded, run)
    for name in ("weights", "alignment"):
        assert rows(run, name) == rows(recorded, name)
    for name in ("kl", "time"):
        assert [row["epoch"] for row in rows(run, name)] == [1, 2, 3]
    if inside:  # The last of the five steps was the only one after the checkpoint.
        assert [row["steps"] for row in rows(run, "time")] == [4, 1, 4]
    else:
        assert rows(run, "kl") == rows(recorded, "kl")
    assert (run / "record/samples-epoch0003.npz").exists()


def test_it_is_no_part_of_the_digest() -> None:
    plain = load_recipe("quickstart")
    recorded = load_recipe("quickstart", overrides=["report.record=weights,kl,time"])
    assert recorded.report.record == ("weights", "kl", "time")
    assert recorded.digest() == plain.digest()
    assert recorded.as_teacher().report.record == ()


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["report.record=wieghts"], "report.record"),
        (
            ["teacher=null", "losses.kd=null", "losses.ce.weight=1", "report.record=kl"],
            "report.record=kl compares the student with its teacher, and this recipe has none",
        ),
    ],
)
def test_wrong_names_are_refused_in_a_sentence(keys: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        load_recipe("quickstart", overrides=keys)
    assert "\n" not in str(caught.value)


def test_stages_of_other_shapes_are_refused_before_anything_is_trained(
    command: Any, tmp_path: Path
) -> None:
    said = command("train", *KEYS, "student.width=0.5", "report.record=alignment")
    assert said.code == 2
    assert "report.record=alignment compares stages of one shape" in said.err
    assert said.err.count("\n") == 1


def test_a_student_without_teacher_records_weights_and_time(command: Any, tmp_path: Path) -> None:
    said = command("train", *ALONE, "baseline.lrs=", "report.record=weights,time", "out=run")
    assert said.code == 0, said.err
    assert [row["epoch"] for row in rows(tmp_path / "run", "weights")] == [0, 1]
    (row,) = rows(tmp_path / "run", "time")
    assert "teacher_ms" not in row and row["steps"] == 2


def test_three_layers_are_the_convolutions_outside_shortcuts() -> None:
    from fastkd.models import create_model

    paths = layers_of(create_model("resnet20", num_classes=7))
    names = [name for name, _ in create_model("resnet20", num_classes=7).named_modules()]
    assert all(path in names for path in paths.values())
    # MEAL V2, figure 7: the middle one is the last convolution of block 2 of a ResNet-50.
    with torch.device("meta"):
        resnet50 = timm.create_model("resnet50")
    found = {"first": "conv1", "middle": "layer2.3.conv3", "last": "layer4.2.conv3"}
    assert layers_of(resnet50) == found
    plain = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    assert layers_of(plain) == {"first": "0", "middle": "1", "last": "3"}
    with pytest.raises(UserError, match="has 1 convolutions and linear layers"):
        layers_of(nn.Sequential(nn.Linear(4, 5)))


@pytest.mark.matrix
def test_rank_0_alone_writes(ranks: Any, tmp_path: Path) -> None:
    ranks(2, "recorded_ranks.py", tmp_path)
    run = tmp_path / "run"
    for name, first in (("weights", 0), ("kl", 1), ("alignment", 1), ("time", 1)):
        assert [row["epoch"] for row in rows(run, name)] == list(range(first, 3))
    # Both ranks' images are counted: the last 2 steps of 32.
    assert [row["images"] for row in rows(run, "kl")] == [64, 64]
