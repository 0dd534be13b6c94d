"""Teachers that are given: with what their file says, of any training, or tuned on this data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastkd.models import create_model, model_from_file
from fastkd.models.reused_head import Projector, ReusedHead
from fastkd.storage.weights import load_weights, save_weights
from fastkd.teachers.config import TeacherConfig
from fastkd.testing.recipes import TINY_QUICKSTART

TINY = (
    *TINY_QUICKSTART,
    "teacher.min_accuracy=0",
)
GIVEN = ("teacher.train=false", "teacher.weights=given.safetensors")
DATA = ("data.name=synthetic", "data.image_size=16")


def accuracy(command: Callable[..., Any], *words: str) -> str:
    said = command("eval", *words, *DATA, "precision=fp32", "device=cpu")
    assert said.code == 0, said.err
    (found,) = (line.split()[-1] for line in said.out.splitlines() if "  accuracy " in line)
    return f"{float(found):.2%}"


WAYS = ("state_dict", "state_dict_ema")
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "block": ("wrn_16_2", {"block": "G(4)"}, "block=G:4"),
    "width": ("resnet8", {"width": 0.75}, "width=0.75"),
    "stem": ("resnet18", {"stem": "imagenet-nopool", "width": 0.125}, "stem=imagenet-nopool"),
    "shortcuts without weights": ("resnet8", {"shortcuts": "pad"}, "shortcuts=pad"),
    "no shortcuts": ("wrn_10_1", {"shortcuts": False}, "shortcuts=false"),
    "several": ("resnet14", {"block": "BG(2,M/4)", "width": 0.5}, "block=BG:2:M:4"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_network_of_that_name(
    case: str, command: Callable[..., Any], tmp_path: Path
) -> None:
    name, options, key = OTHERS[case]
    model = create_model(name, 10, **options)
    save_weights(tmp_path / "given.safetensors", model)
    # Imitated as it is, and its options said.
    said = command("train", *TINY, *GIVEN, f"teacher.name={name}", "out=run")
    assert said.code == 0, said.err
    assert f"teacher {name} (" in said.out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["teacher"]["params"] == sum(p.numel() for p in model.parameters())
    # A student is what the recipe says: the message gives the key, which then works.
    start = ("student.weights=given.safetensors", f"student.name={name}", "student.width=null")
    alone = ("teacher=null", "losses.kd=null", "losses.ce.weight=1", "optim.lr=1e-9")
    words = [w for w in TINY if not w.startswith(("teacher", "student"))]
    said = command("train", *words, *alone, *start, "out=student")
    assert said.code == 2
    advice = said.err.rpartition(": set ")[2].split()
    assert f"student.{key}" in advice
    said = command("train", *words, *alone, *start, *advice, "out=student")
    assert said.code == 0, said.err
    tuned = load_weights(tmp_path / "student")[0]
    for path, value in model.state_dict().items():
        if path.endswith("weight"):
            torch.testing.assert_close(tuned[path], value, atol=1e-5, rtol=0)


def test_given_options_that_differ_are_refused_with_the_cure(tmp_path: Path) -> None:
    save_weights(tmp_path / "given.safetensors", create_model("wrn_16_2", 10, block="G(4)"))
    with pytest.raises(Exception, match=r"holds wrn_16_2 with block=G\(4\).*set block=G:4"):
        create_model("wrn_16_2", 10, weights=tmp_path / "given.safetensors", block="S")


def simkd(path: Path) -> ReusedHead:
    body = create_model("resnet8", 10, width=0.5)
    model = ReusedHead(body, Projector(32, 24, 2), nn.Linear(24, 10), tap="stage3", size=(4, 4))
    save_weights(path, model)
    return model


def test_a_run_of_simkd_stands_wherever_weights_are_asked_for(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    model = simkd(tmp_path / "given.safetensors")
    words = ("teacher.name=resnet8", "teacher.width=null")
    said = command("train", *TINY, *GIVEN, *words, "out=run")
    assert said.code == 0, said.err
    assert "teacher resnet8 (simkd:resnet8): accuracy" in said.out
    found = accuracy(command, "resnet8", "--weights", "given.safetensors")
    assert f"teacher resnet8 (simkd:resnet8): accuracy {found}" in said.out
    # Its body is the start of a student, with a new classifier: its own one learned nothing.
    start = ("student.weights=given.safetensors", "student.name=resnet8", "optim.lr=1e-9")
    alone = ("teacher=null", "losses.kd=null", "losses.ce.weight=1", "student.width=0.5")
    words = tuple(w for w in TINY if not w.startswith(("teacher", "student")))
    said = command("train", *words, *alone, *start, "out=student")
    assert said.code == 2
    assert "(student.new_head=true) takes the body alone" in " ".join(said.err.split())
    said = command("train", *words, *alone, *start, "student.new_head=true", "out=student")
    assert said.code == 0, said.err
    tuned = load_weights(tmp_path / "student")[0]
    torch.testing.assert_close(
        tuned["layer3.0.conv1.weight"],
        model.student.get_submodule("layer3.0.conv1").weight.detach(),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("name", "classes"), [("resnet14", 7), ("wrn_10_1", 10), ("timm:test_resnet", 3)]
)
def test_a_given_teacher_is_tuned(
    name: str, classes: int, command: Callable[..., Any], tmp_path: Path
) -> None:
    given = create_model(name, classes)
    torch.save({"state_dict": given.state_dict()}, tmp_path / "given.pth")
    tune = (f"teacher.name={name}", "teacher.train=true", "teacher.weights=given.pth")
    words = [word for word in TINY if not word.startswith("teacher.width")]
    # A rate at which nothing moves shows where the training began.
    still = ("teacher.width=null", "teacher.lr=1e-9", "teacher.epochs=1", "optim.weight_decay=0")
    said = command("train", *words, *tune, "teacher.new_head=true", *still, "out=run")
    assert said.code == 0, said.err
    (lesson,) = (tmp_path / "runs" / "teachers").rglob("best.safetensors")
    tuned = model_from_file(lesson).state_dict()
    head = {key for key in tuned if key.startswith(("fc.", "head."))}
    assert head
    for key, value in given.state_dict().items():
        if key not in head and key.endswith("weight"):
            torch.testing.assert_close(tuned[key], value, atol=1e-5, rtol=0)
    for key in head:
        assert tuned[key].shape[0] == 10
        assert tuned[key].shape != given.state_dict()[key].shape or not torch.equal(
            tuned[key], given.state_dict()[key]
        )


def test_without_a_new_head_a_given_teacher_is_finished(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    given = create_model("resnet14", 10)
    save_weights(tmp_path / "given.safetensors", given)
    words = ("teacher.train=true", "teacher.weights=given.safetensors", "teacher.name=resnet14")
    said = command("train", *TINY, *words, "teacher.width=null", "out=run")
    assert said.code == 0, said.err
    assert not (tmp_path / "runs" / "teachers").exists()


@pytest.mark.parametrize(
    ("keys", "trains"),
    [
        ({"train": True}, True),
        ({"train": True, "weights": "a.pth"}, False),
        ({"train": True, "weights": "a.pth", "new_head": True}, True),
        ({"train": True, "weights": "a.pth", "new_head": True, "frozen": "backbone"}, True),
        ({"train": True, "pretrained": True}, True),
        ({"train": True, "pretrained": True, "new_head": True}, True),
        ({"weights": "a.pth"}, False),
    ],
)
def test_what_is_trained(keys: dict[str, Any], trains: bool) -> None:
    assert TeacherConfig(name="resnet8", **keys).trains is trains


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        ({"weights": "a.pth", "new_head": True}, "set teacher.train=true to"),
        (
            {"train": True, "weights": "a.pth", "frozen": "backbone"},
            "set teacher.train=true teacher.new_head=true to",
        ),
        ({"pretrained": True, "new_head": True}, "set teacher.train=true to"),
        (
            {"train": True, "weights": "a.pth", "new_head": True, "class_map": (1, 0)},
            "leave it out, or leave out teacher.new_head",
        ),
        ({"train": True, "weights_key": "ema"}, "set weights=FILE as well"),
    ],
)
def test_what_does_not_go_together(keys: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        TeacherConfig(name="resnet8", **keys)


def test_a_key_chooses_in_a_recipe(command: Callable[..., Any], tmp_path: Path) -> None:
    """The teacher of a timm checkpoint is the average; the key takes the other one."""
    networks = {}
    for seed, key in enumerate(WAYS):
        torch.manual_seed(seed)
        networks[key] = create_model("resnet8", 10)
        save_weights(tmp_path / f"{key}.safetensors", networks[key])
    torch.save({key: net.state_dict() for key, net in networks.items()}, tmp_path / "timm.pth.tar")
    found = {
        key: accuracy(command, "resnet8", "--weights", f"{key}.safetensors") for key in networks
    }
    assert len(set(found.values())) == 2
    words = (*TINY, "teacher.train=false", "teacher.name=resnet8", "teacher.width=null")
    words += ("teacher.weights=timm.pth.tar",)
    said = command("train", *words, "out=ema")
    assert said.code == 0, said.err
    assert f"teacher resnet8: accuracy {found['state_dict_ema']}" in said.out
    assert "using state_dict_ema" in said.err
    assert said.err.count("; using ") == 1
    said = command("train", *words, "teacher.weights_key=state_dict", "out=raw")
    assert said.code == 0, said.err
    assert f"teacher resnet8: accuracy {found['state_dict']}" in said.out
    assert "; using " not in said.err
    said = command("eval", "resnet8", "--weights", "timm.pth.tar", *DATA, "student.weights_key=x")
    assert said.code == 2
    assert "names nothing in this file" in said.err
