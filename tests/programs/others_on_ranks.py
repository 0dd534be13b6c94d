"""Other people's networks and loaders on one process or two ranks: `others_on_ranks.py FILE`.

Writes FILE.RANK, a torch.save of what every case left or said; started by
tests/training/test_others_on_ranks.py.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd.compute.ranks import open_world
from fastkd.errors import FastKDError
from fastkd.losses import AT, KD, SP, CrossEntropy
from fastkd.losses.base.term import LossTerm
from fastkd.training.config import OptimConfig

SGD = OptimConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.01, schedule="constant")
X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(5))
IDS = torch.arange(16) % 4
RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Net(nn.Module):
    """Two convolutions and a layer that nothing uses."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls = 0

    def second(self, x: Tensor) -> Tensor:
        return self.conv2(x).relu()

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).relu()
        self.calls += self.training
        return self.fc((self.trained(x) if self.training else self.second(x)).mean((2, 3)))

    def trained(self, x: Tensor) -> Tensor:
        return self.second(x)


class Reentrant(Net):
    """Its checkpoints would mark parameters twice in DDP's search for idle ones."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed)
        del self.idle

    def trained(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, x, use_reentrant=True)


class Drops(Net):
    def trained(self, x: Tensor) -> Tensor:
        return x if torch.rand(()) < 0.4 else self.second(x)


class EverySecond(Net):
    """Runs when it is looked at, and is skipped on all ranks in the first step."""

    def trained(self, x: Tensor) -> Tensor:
        return self.second(x) if self.calls % 2 else x


class Together(Net):
    """Every pass in training asks the other ranks."""

    def trained(self, x: Tensor) -> Tensor:
        if SIZE > 1:
            dist.all_reduce(torch.zeros(1))
        return self.second(x)


class Fp32OnRank1(Net):
    def second(self, x: Tensor) -> Tensor:
        if RANK and torch.is_autocast_enabled("cpu"):
            raise RuntimeError("this machine computes in fp32")
        return super().second(x)


def shares(images: Tensor = X, labels: Tensor = IDS) -> list[Any]:
    """Two batches of 8; a rank has every second image of each."""
    half = len(images) // 2
    return [
        (images[at : at + half][RANK::SIZE], labels[at : at + half][RANK::SIZE]) for at in (0, half)
    ]


def run(
    student: Net, losses: list[LossTerm], train: Any = None, val: Any = None, **options: Any
) -> dict[str, Any]:
    """The trained weights, or what was said."""
    given: dict[str, Any] = {"precision": "fp32"} | options
    try:
        result = fastkd.distill(
            student,
            Net(2),
            shares() if train is None else train,
            shares() if val is None else val,
            epochs=3,
            losses=losses,
            optim=SGD,
            device="cpu",
            compile="off",
            quiet=True,
            **given,
        )
    except FastKDError as error:
        return {"said": f"{type(error).__name__}: {error}"}
    return {
        "state": result.student.state_dict(),
        "loss": [row["train_loss"] for row in result.metrics["history"]],
        "measured": [name for name in result.metrics if name in ("map_last", "accuracy_last")],
        "precision": result.placement.precision.name if result.placement else None,
        "skipped": result.metrics["skipped_steps"],
    }


def at(weight: float = 100.0) -> AT:
    return AT(pairs={"conv2": "conv2"}, weight=weight)


def unlabelled(*ranks: int) -> list[Any]:
    """The labels of these ranks are hidden."""
    labels = torch.full_like(IDS, -100) if RANK in ranks else IDS
    return shares(X, labels)


def several() -> Tensor:
    """Rows of labels of which only rank 1 has some that are no distributions."""
    rows_NC = nn.functional.one_hot(IDS, 4).float()
    rows_NC[1::2, 0] = 1
    return rows_NC


def one_over() -> list[Any]:
    """The last batch has one image on rank 1, two elsewhere."""
    (images, labels), _ = shares()
    num = 1 if RANK else 2
    return [(images[:4], labels[:4]), (images[:num], labels[:num])]


class Short(list[Any]):
    """Says two batches and yields one on rank 1."""

    def __iter__(self) -> Any:
        yield from [*super().__iter__()][: 2 - RANK]


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "idle": lambda: run(Net(), [KD(), at()]),
    "idle, alone": lambda: run(Net(), [CrossEntropy()]),
    "reentrant": lambda: run(Reentrant(), [KD()]),
    "dropped": lambda: run(Drops(), [KD(), at()]),
    "dropped together": lambda: run(EverySecond(), [KD(), SP(pairs={"conv2": "conv2"})]),
    "lengths": lambda: run(Net(), [CrossEntropy()], shares()[: 2 - RANK]),
    "ends early": lambda: run(Net(), [CrossEntropy()], Short(shares())),
    "labels on one rank": lambda: run(Net(), [CrossEntropy()], unlabelled(1)),
    "labels on none": lambda: run(Net(), [CrossEntropy()], unlabelled(0, 1)),
    "several on one rank": lambda: run(Net(), [CrossEntropy()], shares(X, several())),
    "several in validation": lambda: run(Net(), [KD(ce_weight=0)], None, shares(X, several())),
    "fp32 on one rank": lambda: run(Fp32OnRank1(), [CrossEntropy()], precision="auto"),
    "one over": lambda: run(Together(), [CrossEntropy()], one_over()),
    "validation on one rank": lambda: run(Net(), [CrossEntropy()], None, unlabelled(1)),
    "validation on none": lambda: run(Net(), [CrossEntropy()], None, unlabelled(0, 1)),
}


def main(target: str) -> None:
    with open_world("cpu", timeout_s=20):
        found = {name: case() for name, case in CASES.items()}
    torch.save(found, f"{target}.{RANK}")


if __name__ == "__main__":
    main(sys.argv[1])
