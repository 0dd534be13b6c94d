"""`resume=True` in every state of a folder, `on_epoch`, and other commands on such a folder."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd.errors import Interrupted, UserError
from fastkd.losses import KD, CrossEntropy
from fastkd.models import model_from_file
from fastkd.output.console import Console
from fastkd.recipes.loading import load_recipe
from fastkd.storage.weights import load_into

QUIET: dict[str, Any] = {"device": "cpu", "compile": "off", "precision": "fp32", "quiet": True}


def net(seed: int = 2, classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


def samples(num: int, classes: int = 4, side: int = 8) -> TensorDataset:
    images_NCHW = torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(num))
    return TensorDataset(images_NCHW, torch.arange(num) % classes)


TRAIN = DataLoader(samples(32), batch_size=8, shuffle=True)
VAL = DataLoader(samples(20), batch_size=8)


def distill(out: Path | None, *, resume: bool = False, **options: Any) -> Any:
    given = {"epochs": 3, "losses": [CrossEntropy()]} | QUIET | options
    return fastkd.distill(net(), None, TRAIN, VAL, out=out, resume=resume, **given)


def state(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(state(one)[key], value) for key, value in state(other).items())


@pytest.fixture(scope="module")
def whole() -> Any:
    """The run that the interrupted ones must equal."""
    return distill(None)


def stop_in_epoch(number: int) -> Any:
    def on_epoch(row: dict[str, Any]) -> None:
        if row["epoch"] == number:
            os.kill(os.getpid(), signal.SIGINT)

    return on_epoch


def nothing(out: Path) -> None:
    """A folder that is not there."""


def empty(out: Path) -> None:
    """A folder that somebody has made."""
    out.mkdir()


def finished(out: Path) -> None:
    """A run to its end."""
    distill(out)


def stopped(out: Path) -> None:
    """A run that was stopped after its first epoch."""
    with pytest.raises(Interrupted):
        distill(out, on_epoch=stop_in_epoch(1))


def stopped_after_all(out: Path) -> None:
    """A run that was stopped after its last epoch, before its summary."""
    with pytest.raises(Interrupted, match="stopped after the last epoch"):
        distill(out, on_epoch=stop_in_epoch(3))


def killed_at_once(out: Path) -> None:
    """A run that was killed before its first save."""
    distill(out)
    for path in out.iterdir():
        if path.name not in ("config.yaml", "environment.json"):
            path.unlink()


def without_summary(out: Path) -> None:
    """A run that was killed while it wrote its report."""
    distill(out)
    (out / "summary.json").unlink()
    (out / "curves.png").unlink()


def of_version_0_1(out: Path) -> None:
    """A stopped run of fastkd 0.1, which did not describe its calls."""
    stopped(out)
    (out / "config.yaml").unlink()


STATES = [
    nothing,
    empty,
    finished,
    stopped,
    stopped_after_all,
    killed_at_once,
    without_summary,
    of_version_0_1,
]


@pytest.mark.parametrize("prepare", STATES)
def test_resume_comes_to_the_same_end_from_every_state(
    prepare: Any, whole: Any, tmp_path: Path
) -> None:
    prepare(tmp_path / "run")
    result = distill(tmp_path / "run", resume=True)
    assert same(result.student, whole.student)
    assert same(result.best, whole.best)
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    for row, other in zip(result.history, whole.history, strict=True):
        assert (row["train_loss"], row["val_loss"]) == (other["train_loss"], other["val_loss"])
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "metrics.csv",
        "last.pt",
        "best.safetensors",
        "summary.json",
        "curves.png",
    }
    assert (tmp_path / "run/curves.png").read_bytes()[:4] == b"\x89PNG"
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["accuracy_best"] == result.metrics["accuracy_best"]


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = distill(tmp_path / "run", losses=[KD(), CrossEntropy()][1:])
    rows = list[Any]()
    again = distill(tmp_path / "run", resume=True, on_epoch=rows.append)
    assert rows == []
    assert again.history == first.history
    (tmp_path / "run/last.pt").unlink()
    with pytest.raises(UserError, match=r"is finished, but its last.pt is gone.*load_into\(stud"):
        distill(tmp_path / "run", resume=True)
    student = net(9)
    load_into(student, str(tmp_path / "run"))
    assert same(student, first.best)


def test_an_interruption_says_what_resumes_it_and_that_does(whole: Any, tmp_path: Path) -> None:
    out = tmp_path / "it's a run"
    with pytest.raises(Interrupted) as stop:
        distill(out, on_epoch=stop_in_epoch(2))
    assert stop.value.exit_code == 130
    advice = re.search(r"distill\(\.\., (out=.*, resume=True)\)\.$", str(stop.value))
    assert advice
    result = distill(**eval(f"dict({advice[1]})"))
    assert same(result.student, whole.student)


def test_an_interruption_without_a_folder_says_how_to_have_one() -> None:
    with pytest.raises(Interrupted, match=r"no run folder\. With out=FOLDER the next one can be"):
        distill(None, on_epoch=stop_in_epoch(2))


OTHERS = {
    "epochs": ({"epochs": 2}, "epochs: 3 there, 2 here"),
    "seed": ({"seed": 1}, "seed: 0 there, 1 here"),
    "rate": ({"lr": 0.01}, "optim.lr: 0.05 there, 0.01 here"),
    "average": ({"ema": 0.9}, "ema: None there, 0.9 here"),
    "accumulation": ({"accumulate": 2}, "accumulate: 1 there, 2 here"),
    "loss": ({"losses": [CrossEntropy(label_smoothing=0.1)]}, "label_smoothing: 0.0 there, 0.1 he"),
    "precision": ({"precision": "bf16"}, "precision: fp32 there, bf16 here"),
}


@pytest.mark.parametrize("prepare", [stopped, finished, killed_at_once])
@pytest.mark.parametrize(("options", "sentence"), OTHERS.values(), ids=OTHERS)
def test_a_call_with_other_arguments_is_told_which(
    prepare: Any, options: Any, sentence: str, tmp_path: Path
) -> None:
    prepare(tmp_path / "run")
    with pytest.raises(UserError, match=re.escape(sentence)):
        distill(tmp_path / "run", resume=True, **options)
    assert (tmp_path / "run/config.yaml").exists()


def test_another_resolution_of_the_teacher_is_named(tmp_path: Path) -> None:
    def taught(side: int | None, out: Path) -> Any:
        options: dict[str, Any] = {"epochs": 1, "losses": [KD()], "teacher_resolution": side}
        return fastkd.distill(net(), net(3), TRAIN, None, out=out, resume=True, **QUIET | options)

    for name, first, second in (("resized", 12, 16), ("as it is", None, 12)):
        taught(first, tmp_path / name)
        sentence = f"(teachers.0.resolution: {first} there, {second} here)"
        with pytest.raises(UserError, match=re.escape(sentence)):
            taught(second, tmp_path / name)
        assert taught(first, tmp_path / name).metrics["epochs"] == 1


def test_a_teacher_of_other_weights_is_refused(tmp_path: Path) -> None:
    out, ends = tmp_path / "out", stop_in_epoch(1)

    def taught(teacher: nn.Module, **options: Any) -> Any:
        given = {"epochs": 2, "out": out} | QUIET | options
        return fastkd.distill(net(), teacher, TRAIN, VAL, **given)

    with pytest.raises(Interrupted):
        taught(net(7), on_epoch=ends)
    with pytest.raises(UserError, match="was begun with other weights in its teacher"):
        taught(net(8), resume=True)
    assert len(taught(net(7), resume=True).history) == 2


def test_the_checkpoint_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distill(tmp_path / "run")
    opened, load = list[Any](), torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: opened.append(a[0]) or load(*a, **k))
    monkeypatch.setenv("HOME", str(tmp_path))
    distill(Path("~/run"), resume=True)
    assert opened == [tmp_path / "run/last.pt"]


def test_folders_that_are_no_run_of_distill_are_left_alone(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("mine")
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    (recipe / "config.yaml").write_text("name: quickstart\n")
    (tmp_path / "file").write_text("mine")
    for out, resume, sentence in (
        (notes, True, "notes is not a run folder"),
        (notes, False, "exists and is not empty: choose another folder$"),
        (recipe, True, "is the run folder of a recipe: fastkd train --resume .*recipe resumes it"),
        (recipe, False, "exists and is not empty: choose another folder$"),
        (tmp_path / "file", True, "cannot be made: File exists"),
        (tmp_path / "file", False, "cannot be made: File exists"),
        (None, True, "resume=True needs out="),
    ):
        with pytest.raises(UserError, match=sentence):
            distill(out, resume=resume)
    assert [path.name for path in notes.iterdir()] == ["a.txt"]
    finished(tmp_path / "run")
    with pytest.raises(UserError, match="not empty: resume=True continues it, or gives its result"):
        distill(tmp_path / "run")


class Boom(Exception):
    """An exception of the caller's own."""


@pytest.mark.parametrize("raised", [Boom("x"), KeyError("loss"), StopIteration(), OSError(5, "x")])
def test_what_the_callback_raises_ends_the_run_with_its_state_saved(
    raised: Exception, whole: Any, tmp_path: Path
) -> None:
    def on_epoch(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise raised

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(type(raised)) as caught:
        distill(tmp_path / "run", on_epoch=on_epoch)
    assert caught.value is raised
    assert caught.value.__notes__ == [
        "fastkd: raised by on_epoch after epoch 2, which is saved: resume=True continues after it"
    ]
    assert signal.getsignal(signal.SIGINT) is before
    rows = list[Any]()
    result = distill(tmp_path / "run", resume=True, on_epoch=rows.append)
    assert same(result.student, whole.student)
    assert [row["epoch"] for row in rows] == [3]


def test_the_callback_gets_the_rows_and_cannot_change_them(tmp_path: Path) -> None:
    rows = list[dict[str, Any]]()

    def on_epoch(row: dict[str, Any]) -> str:
        rows.append(dict(row))
        torch.rand(3)  # random numbers of its own change nothing
        row.clear()
        return "ignored"

    result = distill(tmp_path / "run", on_epoch=on_epoch)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert rows == result.history == [json.loads(line) for line in lines]
    assert {"epoch", "lr", "train_loss", "val_accuracy", "val_loss", "images_per_s"} <= set(rows[0])


@pytest.mark.parametrize(
    ("on_epoch", "sentence"),
    [
        ("print", "on_epoch='print'; expected a function of one argument"),
        ([print], "expected a function of one argument"),
        (lambda: None, "on_epoch is called with one argument, .* does not take"),
        (lambda epoch, row: None, "missing a required argument: 'row'"),
        (lambda *, row: None, "does not take"),
    ],
)
def test_a_callback_that_cannot_be_called_is_refused_at_once(
    on_epoch: Any, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        distill(tmp_path / "run", on_epoch=on_epoch)
    assert not (tmp_path / "run").exists()


def test_a_callback_may_be_anything_that_takes_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    class Logger:
        rows = 0

        def __call__(self, data: dict[str, Any], step: int | None = None) -> None:
            self.rows += 1

    logger, every = Logger(), list[Any]()
    for on_epoch in (logger, every.append, print):
        distill(None, epochs=1, on_epoch=on_epoch)
    assert logger.rows == len(every) == 1
    assert capsys.readouterr().out.startswith("{'epoch': 1")


def test_the_callback_of_rank_0_ends_all_ranks(ranks: Any, tmp_path: Path) -> None:
    ranks(2, "callback_ranks.py", tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert [row["epoch"] for row in first["rows"]] == [1, 2]
    assert first["raised"] == "LookupError: no such dashboard"
    assert second["rows"] == []
    assert second["raised"] == (
        "RunFailed: on_epoch failed on rank 0: LookupError('no such dashboard')"
    )


def test_a_long_epoch_without_a_terminal_is_not_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("fastkd.output.console.time.monotonic", lambda: clock[0])
    console = Console(live=False)
    console.stage("distill")

    def steps(epoch: int, count: int, step_s: float) -> list[str]:
        for step in range(1, count + 1):
            clock[0] += step_s
            console.progress(
                epoch=epoch,
                epochs=2,
                step=step,
                steps=count,
                images_per_s=100.0,
                data_wait=0.1,
                loss=2.5,
            )
        return capsys.readouterr().out.splitlines()

    # Three hours in steps of half a second: soon a sign of life, then ever more rarely.
    said = steps(0, 21_600, 0.5)
    assert said[0].startswith("distill  epoch 1/2  step 60/21600  100 images/s  wait 10%  loss 2.5")
    assert "left" in said[0]
    assert 15 < len(said) < 30
    console.epoch({"epoch": 1, "train_loss": 2.5}, 2)
    assert len(capsys.readouterr().out.splitlines()) == 1
    # An epoch of a minute is over before it is worth another line.
    assert steps(1, 60, 1.0) == []


IMAGES = DataLoader(samples(24, classes=10, side=32), batch_size=8)


@pytest.fixture(scope="module")
def zoo_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A network of the zoo, with options, distilled."""
    torch.manual_seed(0)
    student = fastkd.create_model("resnet8", 10, width=0.5, block="G:2")
    out = tmp_path_factory.mktemp("zoo") / "run"
    return fastkd.distill(
        student, None, IMAGES, IMAGES, epochs=1, losses=[CrossEntropy()], out=out, **QUIET
    )


def test_a_network_of_the_zoo_is_rebuilt_from_its_folder(zoo_run: Any) -> None:
    images_NCHW = next(iter(IMAGES))[0]
    with torch.no_grad():
        found_NC = model_from_file(zoo_run.run_dir).eval()(images_NCHW)
        torch.testing.assert_close(found_NC, zoo_run.best(images_NCHW))


def test_eval_asks_for_images_and_measures_on_them(zoo_run: Any, command: Any) -> None:
    said = command("eval", str(zoo_run.run_dir))
    assert said.code == 2
    assert "is a run of fastkd.distill, and its validation images are in the script" in said.err
    whole = command("eval", str(zoo_run.run_dir), "data.name=digits", "device=cpu")
    assert (whole.code, whole.err) == (0, "")
    keys = ("student.width=0.5", "student.block=G:2", "data.name=digits", "device=cpu")
    weights = str(zoo_run.run_dir / "best.safetensors")
    by_hand = command("eval", "resnet8", "--weights", weights, *keys)
    assert by_hand.code == 0
    assert whole.out.splitlines()[1:] == by_hand.out.splitlines()[1:]


def test_resume_and_config_of_such_a_folder_say_where_it_comes_from(
    zoo_run: Any, command: Any
) -> None:
    config = str(zoo_run.run_dir / "config.yaml")
    for words in (
        ("--resume", str(zoo_run.run_dir)),
        ("--config", config),
        ("quickstart", "--config", config),
    ):
        said = command("train", *words)
        assert (said.code, said.out) == (2, "")
        assert "describes a run of fastkd.distill, whose networks and loaders no recipe" in said.err
        assert f"distill(.., out={str(zoo_run.run_dir)!r}, resume=True)" in said.err
    with pytest.raises(UserError, match=r"describes a run of fastkd\.distill"):
        load_recipe(None, config=config)


def test_a_network_of_ones_own_is_said_to_be_that(command: Any, tmp_path: Path) -> None:
    result = distill(tmp_path / "run", epochs=1)
    sentence = "its network is a Sequential, which fastkd did not build and cannot rebuild"
    with pytest.raises(UserError, match=sentence):
        model_from_file(tmp_path / "run")
    for words in ((), ("data.name=digits",)):
        said = command("eval", str(tmp_path / "run"), *words)
        assert said.code == 2
        assert sentence in said.err
    # What it advises.
    network = net(8)
    load_into(network, tmp_path / "run")
    assert same(network, result.best)
