"""A last.pt that does not belong to this run is refused whole, before any part of it is taken."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from fastkd.errors import UserError
from fastkd.losses import CRD, KD
from fastkd.models import create_model
from fastkd.storage.checkpoint import Checkpoint, save_checkpoint
from fastkd.training.checkpointing import states_of
from fastkd.training.config import OptimConfig
from fastkd.training.settings import TrainingSettings
from fastkd.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "programs"))
from tiny_trainer import data_of, make_trainer

OPTIMIZERS = {
    "sgd": OptimConfig(lr=0.05, schedule="constant"),
    "plain sgd": OptimConfig(lr=0.05, schedule="constant", momentum=0),
    "adamw": OptimConfig(name="adamw", lr=0.01, schedule="onecycle", warmup_epochs=0),
    "adam": OptimConfig(name="adam", lr=0.01, schedule="poly", power=0.5),
    "lamb": OptimConfig(name="lamb", lr=0.01, schedule="constant"),
}


def trainer(optimizer: str = "sgd") -> Trainer:
    torch.manual_seed(1)
    return make_trainer(
        create_model("resnet8", 10, width=0.25),
        [KD(), CRD(pairs={"pooled": "pooled"}, dim=4, negatives=4)],
        data=data_of(20, 10, batch_size=10),
        settings=TrainingSettings(optim=OPTIMIZERS[optimizer], ema=0.9, compile="off"),
        epochs=2,
    )


@pytest.fixture(scope="module")
def saved() -> dict[str, dict[str, Any]]:
    """By optimizer: the state after one epoch."""
    found = {}
    for name in OPTIMIZERS:
        one = trainer(name)
        for step, prepared in enumerate(one.prepare(0)):
            one.optimize(prepared, 0, step)
        one.progress.next_epoch()
        one.history.append({"epoch": 1, "loss": 0.5, "val_accuracy": 0.25})
        found[name] = copy.deepcopy(states_of(one.saved_parts()))
    return found


def resumed(state: dict[str, Any], optimizer: str = "sgd") -> Trainer:
    one = trainer(optimizer)
    one.resume(Checkpoint(Path("last.pt"), copy.deepcopy(state) | {"digest": "0" * 16}))
    return one


def walk(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all tensors."""
    if isinstance(tree, Tensor):
        return [path]
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
    inner = [] if isinstance(tree, str) else entries
    return [
        one
        for key, value in inner
        if isinstance(value, dict | list | tuple | Tensor)
        for one in walk(value, (*path, key))
    ]


def changed(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    *above, last = path
    inner: Any = state
    for key in above:
        inner = inner[key]
    inner[last] = value(inner[last]) if callable(value) else value
    return state


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_its_own_state_is_taken(saved: dict[str, Any], optimizer: str) -> None:
    one = resumed(saved[optimizer], optimizer)
    assert one.progress.epoch == 1
    found = states_of(one.saved_parts())
    for path in walk(saved[optimizer]):
        expected, taken = saved[optimizer], found
        for key in path:
            expected, taken = expected[key], taken[key]
        assert torch.equal(expected, taken), path
    for step, prepared in enumerate(one.prepare(1)):
        one.optimize(prepared, 1, step)


DAMAGE: dict[str, Callable[[Tensor], Any]] = {
    "longer": lambda value: torch.zeros(*value.shape, 7, dtype=value.dtype),
    "shorter": lambda value: value.flatten()[:0],
    "a scalar": lambda value: value.sum() if value.dim() else value.view(1),
    "another type": lambda value: (
        value.half() if value.is_floating_point() else value.to(torch.float64)
    ),
    "sparse": lambda value: value.to_sparse() if value.dim() else value.view(1).to_sparse(),
    "a number": lambda _: 1.0,
    "a list": lambda value: value.tolist(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "lamb"])
def test_every_tensor_is_compared(saved: dict[str, Any], optimizer: str, damage: str) -> None:
    """Of every part the first, the middle and the last tensor; the run stays as it was."""
    state = saved[optimizer]
    one = trainer(optimizer)
    before = [parameter.clone() for parameter in one.student.parameters()]
    parts: dict[Any, list[tuple[Any, ...]]] = {}
    for path in walk(state):
        parts.setdefault(path[0], []).append(path)
    assert {"student", "ema", "terms", "optimizer", "guard", "totals"} <= parts.keys()
    for paths in parts.values():
        for path in {paths[0], paths[len(paths) // 2], paths[-1]}:
            wrong = changed(state, path, DAMAGE[damage]) | {"digest": "0" * 16}
            with pytest.raises(UserError, match=r"^last\.pt does not fit this run: ") as caught:
                one.resume(Checkpoint(Path("last.pt"), wrong))
            assert ".".join(map(str, path)) in str(caught.value)
            assert len(str(caught.value)) < 300
    for parameter, value in zip(one.student.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
    assert one.progress.epoch == 0


VALUES: dict[str, tuple[tuple[Any, ...], Any]] = {
    "epoch as text": (("progress", "epoch"), "1"),
    "epoch of nothing": (("progress", "epoch"), None),
    "best not a number": (("progress", "best"), float("nan")),
    "epoch of digits": (("progress", "epoch"), 10**5000),
    "epoch as a mapping": (("progress", "epoch"), {}),
    "no progress": (("progress",), None),
    "progress as a list": (("progress",), [1, 2]),
    "progress with more": (("progress", "more"), lambda: 1),
    "rate as text": (("optimizer", "param_groups", 0, "lr"), "fast"),
    "rate infinite": (("optimizer", "param_groups", 0, "lr"), float("inf")),
    "no rate": (("optimizer", "param_groups", 0), lambda group: {"params": group["params"]}),
    "another group": (("optimizer", "param_groups"), lambda groups: [*groups, groups[0]]),
    "fewer parameters": (("optimizer", "param_groups", 0, "params"), lambda old: old[1:]),
    "groups as text": (("optimizer", "param_groups"), "none"),
    "state of no parameter": (("optimizer", "state"), lambda old: {**old, 999: old[0]}),
    "state as a list": (("optimizer", "state"), lambda old: [*old.values()]),
    "another optimizer's": (
        ("optimizer", "state", 0),
        lambda old: {"exp_avg": old["momentum_buffer"]},
    ),
    "half a state": (("optimizer", "state", 0), lambda old: {**old, "more": 1}),
    "no such loss": (("terms",), lambda old: {"other": old["kd"]}),
    "no student": (("student",), lambda _: {}),
    "history of text": (("history",), ["a"]),
    "history as text": (("history",), "abc"),
    "history of tensors": (("history",), [{"loss": torch.ones(3)}]),
    "history by number": (("history",), [{3: 0.5}]),
    "a scale": (("scaler",), {"scale": 2.0}),
}


@pytest.mark.parametrize("value", VALUES)
def test_values_are_compared(saved: dict[str, Any], value: str) -> None:
    path, new = VALUES[value]
    if value == "progress with more":
        state = copy.deepcopy(saved["sgd"])
        state["progress"]["more"] = 1
    else:
        state = changed(saved["sgd"], path, new)
    with pytest.raises(UserError, match="does not fit this run") as caught:
        resumed(state)
    assert path[0] in str(caught.value)


def test_a_part_that_is_missing(saved: dict[str, Any]) -> None:
    for name in ("ema", "student", "optimizer"):
        state = {key: value for key, value in saved["sgd"].items() if key != name}
        with pytest.raises(UserError, match=f"it has no {name}"):
            resumed(state)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("decisions"),
        lambda state: state.pop("digest"),
        lambda state: state.update(decisions={"compile": 3}),
        lambda state: state.update(decisions={"compile": "sometimes", "precision": "fp32"}),
        lambda state: state["decisions"].update(kernels="[]"),
        lambda state: state.update(digest=7),
        lambda state: state.update(format="9" * 5000),
        lambda state: state["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(2)),
    ],
)
def test_a_run_folder_of_a_stranger(
    command: Callable[..., Any], tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    """By `--resume`: the last of these ended in a segmentation fault."""
    recipe = {
        "name": "tiny",
        "epochs": 2,
        "batch_size": 50,
        "compile": "off",
        "precision": "fp32",
        "device": "cpu",
        "data": {"name": "synthetic", "image_size": 8, "train_limit": 100},
        "student": {"name": "resnet8", "width": 0.25},
        "optim": {"lr": 0.05, "schedule": "constant"},
        "losses": {"ce": {"weight": 1.0}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert command("train", "--config", "recipe.yaml", "out=run").code == 0
    (tmp_path / "run" / "summary.json").unlink()
    last = tmp_path / "run" / "last.pt"
    state: dict[str, Any] = torch.load(last, weights_only=True)
    change(state)
    format_ = state.pop("format")
    save_checkpoint(last, state)
    if format_ != 1:
        torch.save(state | {"format": format_}, last)
    said = command("train", "--resume", "run")
    assert said.code == 2
    assert "last.pt" in said.err and len(said.err) < 500
