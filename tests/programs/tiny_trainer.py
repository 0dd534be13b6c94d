"""Trainers on a few synthetic images, for tests that look at them from inside."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data.facts import Facts
from fastkd.data.loaders.planned import Loading
from fastkd.data.loaders.resident import ResidentLoader
from fastkd.data.sources.image_set import ImageSet
from fastkd.data.sources.synthetic import make_synthetic
from fastkd.losses.base.term import LossTerm
from fastkd.models import create_model
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.teaching import Teaching
from fastkd.training.build import build_trainer
from fastkd.training.progress import Plan
from fastkd.training.settings import Output, TrainData, TrainingSettings
from fastkd.training.trainer import Trainer

ALONE = World(0, 0, 1, torch.device("cpu"), None)
NORMALIZATION = ((0.5,) * 3, (0.25,) * 3)


class Plain(nn.Module):
    """No batch norm: the mean gradient over a batch does not depend on how it is split."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits [N, 10]."""
        return self.fc(torch.tanh(self.conv2(torch.tanh(self.conv1(images_NCHW)))).mean((2, 3)))


def images(split: str, num: int) -> ImageSet:
    """The first images of the synthetic set."""
    whole = make_synthetic(split, 8)
    return ImageSet(whole.name, whole.images_NHWC[:num], whole.labels_N[:num], whole.classes)


def data_of(
    num: int,
    num_val: int,
    *,
    batch_size: int,
    drop_last: bool = True,
    world: World = ALONE,
    kind: type[ResidentLoader] = ResidentLoader,
) -> TrainData:
    """Training and validation images, this rank's share; `kind` of the training loader."""
    loading = Loading(
        batch_size=batch_size,
        seed=0,
        train=True,
        normalization=NORMALIZATION,
        placement=Placement(world, Precision("fp32", "cpu")),
        drop_last=drop_last,
    )
    train = kind(images("train", num), loading)
    val = ResidentLoader(images("val", num_val), replace(loading, train=False))
    facts = Facts((3, 8, 8), 10, train.labels_N, label_kind="class", normalization=NORMALIZATION)
    return TrainData(train, val, facts, num)


def make_trainer(
    student: nn.Module,
    terms: Sequence[LossTerm],
    *,
    data: TrainData,
    settings: TrainingSettings,
    world: World = ALONE,
    teacher: str | None = "resnet8",
    output: Output | None = None,
    **plan: Any,
) -> Trainer:
    """In fp32; the teacher by name, half as wide. plan: `Plan` without what names the run."""
    given = {"stage": "test", "digest": "0" * 16, "seed": 0, "epochs": 1} | plan
    return build_trainer(
        Plan(**given),
        student=student,
        teaching=Teaching((LoadedNet(create_model(teacher, 10, width=0.5)),) if teacher else ()),
        terms=terms,
        data=data,
        settings=settings,
        placement=Placement(world, Precision("fp32", "cpu")),
        output=output or Output(),
    )
