"""A teacher is built once and its file read once, whether it is finished or trained first."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastkd.storage.weight_file
from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data import open_data
from fastkd.data.config import AppearanceConfig, DataConfig
from fastkd.models import create_model
from fastkd.models.card import card_of, sign
from fastkd.storage.weights import save_weights
from fastkd.teachers.config import TeacherConfig
from fastkd.teachers.loading import load_teacher, prove_teacher
from fastkd.testing.recipes import TINY_QUICKSTART

PLACEMENT = Placement(World(0, 0, 1, torch.device("cpu"), None), Precision("fp32", "cpu"))
TINY = (
    *TINY_QUICKSTART,
    "teacher.train=false",
    "teacher.min_accuracy=0",
)


@pytest.mark.parametrize("classes", [10, 20])
def test_a_run_reads_the_file_of_its_teacher_once(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    save_weights(tmp_path / "one.safetensors", create_model("wrn_16_2", classes))
    opened = []
    real = fastkd.storage.weight_file.safe_open

    def noting(path: Path, **options: Any) -> Any:
        opened.append(path.name)
        return real(path, **options)

    monkeypatch.setattr(fastkd.storage.weight_file, "safe_open", noting)
    order = ",".join(map(str, range(classes - 10, classes)))
    mapped = () if classes == 10 else (f"teacher.class_map={order}",)
    said = command("train", *TINY, "teacher.weights=one.safetensors", *mapped, "out=run")
    assert (said.code, said.err) == (0, "")
    assert opened == ["one.safetensors"]
    opened.clear()
    words = ("data.name=synthetic", "data.image_size=16")
    said = command("eval", "resnet8", "--weights", "run", *words)
    assert (said.code, said.err) == (0, "")
    assert opened == ["best.safetensors"]


def test_a_teacher_that_is_trained_first_keeps_its_network(tmp_path: Path) -> None:
    config = TeacherConfig(name="resnet8", width=0.5, train=True, min_accuracy=0)
    data = open_data(
        DataConfig(name="synthetic", image_size=16),
        AppearanceConfig(crop="none", flip=False),
        batch_size=50,
        seed=0,
        placement=PLACEMENT,
    )
    nets = load_teacher(config, data)
    lesson = create_model("resnet8", 10, width=0.5)
    normalization = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    sign(lesson, replace(card_of(lesson), normalization=normalization))
    save_weights(tmp_path / "best.safetensors", lesson)
    said: list[str] = []
    proven, summary, _ = prove_teacher(
        config,
        nets,
        data,
        PLACEMENT,
        say=said.append,
        train=lambda member: (tmp_path, {"epochs": 3}),
    )
    assert proven[0].model is nets[0].model
    assert proven[0].normalization == normalization
    for key, value in lesson.state_dict().items():
        assert torch.equal(proven[0].model.state_dict()[key], value), key
    assert summary is not None and summary["training"] == {"epochs": 3}
    assert said == [f"teacher resnet8: accuracy {summary['accuracy']:.2%}"]
