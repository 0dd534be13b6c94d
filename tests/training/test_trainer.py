"""The loop in one process: accumulation, average, bad steps, graphs, golden losses.

This file is also the program that rewrites tests/golden/first_losses.json after a change of
numerics that is meant: `python tests/training/test_trainer.py`.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from fastkd.cli.commands import main
from fastkd.compute.ranks import World
from fastkd.data.batch import Batch
from fastkd.errors import RunFailed
from fastkd.losses.attention import AT
from fastkd.losses.base.term import LossTerm, TermInputs, TermOutput
from fastkd.losses.logits import KD, CrossEntropy
from fastkd.models import create_model
from fastkd.output.console import Console
from fastkd.output.run_folder import RunFolder
from fastkd.storage.weights import load_weights
from fastkd.training.config import OptimConfig
from fastkd.training.epoch_end import training_row
from fastkd.training.progress import Progress
from fastkd.training.settings import Output, TrainData, TrainingSettings
from fastkd.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "programs"))
from tiny_trainer import Plain, data_of, make_trainer

GOLDEN = Path(__file__).parents[1] / "golden" / "first_losses.json"
WIDTH = {"resnet8": {"width": 0.5}}
ONE = World(0, 0, 1, torch.device("cpu"), None)

Loss = Callable[[], list[LossTerm]]


def make(
    student: str = "resnet8",
    terms: list[LossTerm] | None = None,
    *,
    teacher: str | None = "resnet8",
    data: TrainData | None = None,
    optim: dict[str, Any] | None = None,
    output: Output | None = None,
    plan: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> Trainer:
    """A trainer on five batches of 12; settings: those of `TrainingSettings`."""
    torch.manual_seed(0)
    rates = {"lr": 0.05, "schedule": "constant"} | (optim or {})
    return make_trainer(
        Plain() if student == "plain" else create_model(student, 10, **WIDTH.get(student, {})),
        terms or [CrossEntropy()],
        teacher=teacher,
        data=data or data_of(60, 30, batch_size=12),
        settings=TrainingSettings(
            optim=OptimConfig.model_validate(rates),
            **{"max_skips": 3, "compile": "off"} | settings,
        ),
        output=output,
        **plan,
    )


def partial_batches(num: int) -> TrainData:
    """Batches of 12, the last one smaller."""
    return data_of(num, 30, batch_size=12, drop_last=False)


def poison(trainer: Trainer, steps: set[int]) -> None:
    """NaN in one pixel of these batches of every epoch."""
    epoch = trainer.loader.epoch

    def poisoned(number: int, start_step: int = 0) -> Iterator[Batch]:
        for step, batch in enumerate(epoch(number, start_step), start_step):
            if step in steps:
                batch.images_NCHW[1, 2, 3, 4] = float("nan")
            yield batch

    trainer.loader.epoch = poisoned  # type: ignore[method-assign]


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of all that a step may change."""
    state = {f"step.{key}": value for key, value in trainer.step.state_dict().items()}
    if trainer.ema:
        state |= {f"ema.{key}": value for key, value in trainer.ema.state_dict().items()}
    for number, values in enumerate(trainer.optimizer.state.values()):
        state |= {f"optimizer.{number}.{k}": torch.as_tensor(v) for k, v in values.items()}
    return copy.deepcopy(state | {"totals": trainer.totals_M})


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_accumulation_is_one_big_batch(name: str) -> None:
    # 31 images in batches of 12: the partial batch of 7 is split into 2, 2, 2 and 1.
    def trained(accumulate: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        trainer = make(
            "plain",
            [KD(views=("x", "xprime"))],
            data=partial_batches(31),
            xprime="mixup",
            optim={"name": name, "lr": 0.01, "clip_norm": 0.05},
            plan={"accumulate": accumulate},
        )
        trainer.fit()
        return trainer.student.state_dict(), trainer.history[0]

    (whole, row), (parts, row_of_parts) = trained(1), trained(4)
    start = make("plain").student.state_dict()
    for key, value in whole.items():
        assert not torch.equal(value, start[key])
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-6)
    for key in ("train_loss", "train_kd", "train_kd_xprime", "train_ce", "train_accuracy"):
        assert row_of_parts[key] == pytest.approx(row[key], rel=1e-5)


def test_a_row_is_the_mean_over_images() -> None:
    trainer = make("plain", data=partial_batches(31))
    seen: list[tuple[int, float]] = []
    forward = trainer.step.forward

    def noting(*args: Any) -> Any:
        out = forward(*args)
        seen.append((len(args[1]), out.loss.item()))
        return out

    trainer.step.forward = noting  # type: ignore[method-assign]
    trainer.fit()
    assert [num for num, _ in seen] == [12, 12, 7]
    expected = sum(num * loss for num, loss in seen) / 31
    assert trainer.history[0]["train_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.history[0]["train_ce"] == pytest.approx(expected, rel=1e-6)


def test_the_average_is_what_is_evaluated_and_kept(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "test", "0" * 16)
    trainer = make(ema=0.9, output=Output(folder), plan={"epochs": 2})
    trainer.fit()
    assert trainer.ema is not None
    assert trainer.folder is not None
    student, average = trainer.student.state_dict(), trainer.ema.state_dict()
    assert not torch.equal(student["fc.weight"], average["fc.weight"])
    total = 0.0
    with torch.no_grad():
        for batch in trainer.val_loader.epoch(0):
            logits_NC = trainer.ema.module(batch.images_NCHW)
            total += F.cross_entropy(logits_NC, batch.labels_N, reduction="sum").item()
    assert trainer.history[-1]["val_loss"] == pytest.approx(total / 30, rel=1e-6)
    kept, facts = load_weights(trainer.folder.path)
    again = make(ema=0.9, plan={"epochs": int(facts["epoch"])})
    again.fit()
    assert again.ema is not None
    for key, value in again.ema.state_dict().items():
        assert torch.equal(kept[key], value), key
    saved = torch.load(trainer.folder.path / "last.pt", weights_only=True)
    assert torch.equal(saved["ema"]["fc.weight"], average["fc.weight"])
    assert torch.equal(saved["student"]["fc.weight"], student["fc.weight"])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lamb"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_nan_leaves_everything_as_it_was(name: str, accumulate: int) -> None:
    trainer = make(
        ema=0.9,
        optim={"name": name, "lr": 0.01, "clip_norm": 1.0},
        plan={"accumulate": accumulate},
    )
    poison(trainer, {2})
    optimize, states = trainer.optimize, [everything(trainer)]

    def noting(*args: Any) -> None:
        optimize(*args)
        states.append(everything(trainer))

    trainer.optimize = noting  # type: ignore[method-assign]
    trainer.fit()
    assert different(states[2], states[3]) == []
    assert "step.student.model.fc.weight" in different(states[3], states[4])
    assert trainer.history[0]["skipped"] == 1
    # What was skipped is not in the means either: 4 of 5 batches count.
    assert trainer.history[0]["images_per_s"] * trainer.history[0]["seconds"] == pytest.approx(48)


def test_too_many_bad_steps_fail_the_run() -> None:
    trainer = make(max_skips=2)
    poison(trainer, {0, 2, 3})
    trainer.fit()  # two in a row are allowed
    trainer = make(max_skips=2)
    poison(trainer, {1, 2, 3})
    before = everything(trainer)["step.student.model.fc.weight"]
    with pytest.raises(RunFailed, match="3 steps in a row had a loss or a gradient"):
        trainer.fit()
    assert torch.isfinite(trainer.student.state_dict()["fc.weight"]).all()
    assert not torch.equal(trainer.student.state_dict()["fc.weight"], before)


def test_a_diverging_run_ends_with_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {
        **{"name": "tiny/wild", "epochs": 2, "batch_size": 12, "compile": "off", "device": "cpu"},
        "data": {"name": "synthetic", "image_size": 8, "train_limit": 120},
        "student": {"name": "resnet8", "width": 0.5},
        "losses": {"ce": {"weight": 1.0}},
        "max_skips": 2,
    }
    (tmp_path / "wild.yaml").write_text(yaml.safe_dump(values))
    code = main(["train", "--config", "wild.yaml", "optim.lr=1e30"])
    assert code == 1
    (complaint,) = capsys.readouterr().err.splitlines()
    assert complaint.startswith("fastkd: ")
    assert "steps in a row had a loss or a gradient that was not finite" in complaint
    assert "Lower the learning rate (optim.lr; in Python lr)" in complaint


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_are_smoothed(smoothing: float) -> None:
    terms = [KD(label_smoothing=smoothing, weight=0.7, ce_weight=0.3)]
    trainer = make("plain", terms)
    prepared = next(trainer.prepare(0))
    batch = prepared.batch
    out = trainer.step(prepared.views, batch.labels_N, batch.index_N, prepared.targets, {})
    logits_NC = trainer.student(batch.images_NCHW)
    ce = F.cross_entropy(logits_NC, batch.labels_N, label_smoothing=smoothing)
    student, teacher = logits_NC.double() / 4, prepared.targets["x/teacher/logits"].double() / 4
    kd = 16 * F.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(out.loss, (0.7 * kd + 0.3 * ce).float())
    images, _, of_kd, of_ce, correct = out.metrics_M.tolist()
    assert images == 12
    assert of_kd / 12 == pytest.approx(kd.item(), rel=1e-5)
    assert of_ce / 12 == pytest.approx(ce.item(), rel=1e-5)
    assert correct == int((logits_NC.argmax(1) == batch.labels_N).sum())
    alone = make("plain", [CrossEntropy(label_smoothing=smoothing)])
    out = alone.step(prepared.views, batch.labels_N, batch.index_N, {}, {})
    torch.testing.assert_close(out.loss, ce)


class Scheduled(LossTerm):
    """A scheduled weight on the cross entropy of x'."""

    def __init__(self) -> None:
        super().__init__("scheduled", ("xprime/student/logits",), {"scheduled": 1.0})

    def schedules(self) -> dict[str, Callable[[float], float]]:
        return {"eta": lambda epoch: 1.0 / (1.0 + epoch)}

    def forward(self, inputs: TermInputs) -> TermOutput:
        loss = F.cross_entropy(inputs.tensors["xprime/student/logits"], inputs.labels_N)
        return TermOutput({"scheduled": inputs.schedule["eta"] * loss})


GRAPHS: dict[str, tuple[str, Loss]] = {
    "resnet8-kd-two-views": ("resnet8", lambda: [KD(views=("x", "xprime"))]),
    "wrn_10_1-kd-two-views": ("wrn_10_1", lambda: [KD(views=("x", "xprime"))]),
    "resnet8-at": (
        "resnet8",
        lambda: [CrossEntropy(), AT({"stage1": "stage1", "stage2:preact": "stage2:preact"})],
    ),
    "timm-kd-at": ("timm:test_resnet", lambda: [KD(), AT({"layer2": "stage2"})]),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_step_is_one_graph_with_the_same_loss(name: str) -> None:
    torch.compiler.reset()
    student, terms = GRAPHS[name]
    trainer = make(student, terms(), xprime="cutmix")
    prepared = next(trainer.prepare(0))
    views, batch, targets = prepared.views, prepared.batch, prepared.targets
    scheduled = trainer.update.scheduled(0.5)
    arguments = (views, batch.labels_N, batch.index_N, targets, scheduled)
    state = copy.deepcopy(trainer.step.state_dict())
    eager = trainer.step(*arguments)
    eager.loss.backward()
    gradients = [p.grad.clone() for p in trainer.update.trained if p.grad is not None]
    trainer.step.load_state_dict(state)
    trainer.step.zero_grad()
    unit = torch.compile(trainer.step, backend="aot_eager", fullgraph=True, dynamic=False)
    out = unit(*arguments)
    out.loss.backward()
    torch.testing.assert_close(out.loss, eager.loss)
    torch.testing.assert_close(out.metrics_M, eager.metrics_M)
    for parameter, gradient in zip(trainer.update.trained, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drop_last", [True, False], ids=["whole-batches", "partial-batch"])
class Noting(Console):
    """Calls a function at the end of every epoch."""

    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__(enabled=False)
        self.note_epoch = note

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        self.note_epoch()


@pytest.mark.parametrize("drop_last", [True, False], ids=["whole-batches", "partial-batch"])
def test_a_run_compiles_once_per_batch_shape(drop_last: bool) -> None:
    graphs: list[int] = []
    after_epoch: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    trainer = make(
        "resnet8",
        [KD(views=("x", "xprime")), Scheduled()],
        data=data_of(30, 30, batch_size=12, drop_last=drop_last),
        output=Output(console=Noting(lambda: after_epoch.append(len(graphs)))),
        xprime="cutmix",
        ema=0.9,
        plan={"epochs": 3},
    )
    trainer.update.runner = torch.compile(
        trainer.step, backend=counting, dynamic=False, fullgraph=True
    )
    trainer.fit()
    # Batches of 12, 12 and, if it is kept, 6; epoch, schedule and evaluation add no graph.
    assert after_epoch == ([1, 1, 1] if drop_last else [2, 2, 2])


def first_losses() -> dict[str, list[dict[str, float]]]:
    """Parts of the loss in the first five steps of three small runs, on one thread."""
    runs = {
        "kd": make(terms=[KD(views=("x", "xprime"))], xprime="cutmix"),
        "at": make("wrn_10_1", [CrossEntropy(), AT({"stage1": "stage1"})], xprime="none"),
        "plain": make(teacher=None, optim={"nesterov": True, "clip_norm": 1.0}),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {}
    for name, trainer in runs.items():
        found[name] = []
        for step, prepared in enumerate(trainer.prepare(0)):
            before_M = trainer.totals_M.clone()
            trainer.optimize(prepared, 0, step)
            sums_M = (trainer.totals_M - before_M).tolist()
            sums = dict(zip(trainer.step.metric_names, sums_M, strict=True))
            images = sums.pop("images")
            found[name].append({key: value / images for key, value in sums.items()})
    torch.set_num_threads(threads)
    return found


def test_first_losses_are_golden() -> None:
    golden, found = json.loads(GOLDEN.read_text()), first_losses()
    assert found.keys() == golden.keys()
    for name, steps in golden.items():
        assert len(steps) == 5
        for expected, got in zip(steps, found[name], strict=True):
            assert got == pytest.approx(expected, rel=1e-5, abs=1e-6)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(first_losses(), indent=1) + "\n")


def test_the_wait_for_data_is_at_most_all_of_the_time():
    progress = Progress(epoch_s=2.0, wait_s=2.4)
    row = training_row({"images": 10.0, "loss": 1.0}, progress, lr=0.1, skipped=0)
    assert row["data_wait"] == 1
