"""Loaders of any habit for `fastkd.distill`: the loss and accuracy that the formula gives, or a
refusal before the first step.

The learning rate is too small to change a weight, so the loss of the epoch is that of the networks
as they were built, in float64 from the formula.
"""

import collections
import dataclasses
import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from generated_case import FAILED, REFUSED, Case
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd.losses import KD, CrossEntropy

__all__ = ["make"]

CLASSES, SIDE = 5, 4
T = 4.0
NONE = -100


@functools.cache
def _networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, CLASSES)) for _ in range(2)
    )
    return student, teacher


@dataclasses.dataclass
class Sample:
    """Packing: a dataclass, as torchgeo and others yield."""

    image: Tensor
    label: Any


Named = collections.namedtuple("Named", ["pixel_values", "labels"])


@dataclasses.dataclass(frozen=True)
class Labels:
    """What a loader gives as labels, and the probabilities that they mean."""

    about: str
    given: Any
    rows_NC: Tensor
    """float64; a row of zeros has no label."""
    refused: bool = False


def make(rng: random.Random, _: Path) -> Case:
    """A training loader, a validation loader and the losses."""
    num = rng.randint(3, 14)
    batch = rng.randint(1, num)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    images = torch.randn(num, 3, SIDE, SIDE, generator=generator)
    ids = torch.randint(0, CLASSES, (num,), generator=generator)
    ids[0] = CLASSES - 1  # else the ids could be taken for those of fewer classes
    labels = _labels(rng, ids, generator)
    kind = rng.choice((torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16))
    images = images.to(kind)
    loss = rng.choice(("kd + ce", "kd alone", "ce alone"))
    packing = rng.choice(list(PACKINGS))
    container = rng.choice(list(CONTAINERS))
    items = [
        PACKINGS[packing](images[at : at + batch], labels.given[at : at + batch])
        for at in range(0, num, batch)
    ]
    wrong = rng.choice(list(WRONG)) if rng.random() < 0.2 else None
    if wrong == "labels missing one" and loss == "kd alone":
        wrong = None  # nobody reads them
    about = f"{num} images of {kind} in batches of {batch}, {packing} in {container}, labels "
    about += f"{labels.about}, {loss}, {wrong or 'nothing else'}"
    train: Any = CONTAINERS[container](items)
    if wrong is not None:
        train = WRONG[wrong](images, labels.given, items)
    val_images = images.to(rng.choice((torch.float32, torch.float64)))
    with_val = rng.random() < 0.7
    val = [(val_images[:batch], ids[:batch]), (val_images[batch:], ids[batch:])][
        : 1 + (batch < num)
    ]

    def run() -> Any:
        student, teacher = (_copy(net) for net in _networks())
        result = fastkd.distill(
            student,
            teacher,
            train,
            val if with_val else None,
            epochs=1,
            lr=1e-12,
            losses=_losses(loss),
            precision="fp32",
            compile="off",
            device="cpu",
            quiet=True,
        )
        found = result.metrics
        return found["history"][0]["train_loss"], found["accuracy_last"] if with_val else None

    reads = loss != "kd alone"
    known = bool((labels.rows_NC.sum(1) > 0).all())
    none_known = bool((labels.rows_NC.sum(1) == 0).all())
    if wrong is not None or (labels.refused and reads):
        return Case(about, run, REFUSED)
    if loss == "kd + ce" and not known:
        return Case(about, run, REFUSED)  # KD with labels would leave such an image untaught
    if loss == "ce alone" and none_known:
        return Case(about, run, FAILED)
    return Case(about, run, _expected(images, labels.rows_NC, ids, batch, loss, with_val))


def _copy(net: nn.Module) -> nn.Module:
    made = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, CLASSES))
    made.load_state_dict(net.state_dict())
    return made


def _losses(loss: str) -> list[Any]:
    return {
        "kd + ce": lambda: [KD(temperature=T, weight=0.9, ce_weight=0.1)],
        "kd alone": lambda: [KD(temperature=T, weight=1.0, ce_weight=0)],
        "ce alone": lambda: [CrossEntropy()],
    }[loss]()


def _expected(
    images: Tensor, rows_NC: Tensor, ids: Tensor, batch: int, loss: str, with_val: bool
) -> tuple[float, float | None]:
    """Mean loss over the images, each batch dividing by its labelled rows; accuracy."""
    student, teacher = (_copy(net).double() for net in _networks())
    total = 0.0
    with torch.no_grad():
        x = images.double()
        own, other = student(x), teacher(x)
        p, log_q = (other / T).softmax(1), (own / T).log_softmax(1)
        kd_N = T * T * (p * (p.log() - log_q)).sum(1)
        ce_N = -(rows_NC * own.log_softmax(1)).sum(1)
        for at in range(0, len(images), batch):
            part = slice(at, at + batch)
            size = len(kd_N[part])
            kd, labelled = kd_N[part].mean(), (rows_NC[part].sum(1) > 0).sum()
            ce = ce_N[part].sum() / max(int(labelled), 1)
            parts = {"kd + ce": 0.9 * kd + 0.1 * ce, "kd alone": kd, "ce alone": ce}
            total += size * float(parts[loss])
        accuracy = float((own.argmax(1) == ids).double().mean()) if with_val else None
    return total / len(images), accuracy


def _labels(  # noqa: PLR0911 - a table
    rng: random.Random, ids: Tensor, generator: torch.Generator
) -> Labels:
    one_hot = F.one_hot(ids, CLASSES)
    rows = one_hot.double()
    kind = rng.randrange(12)
    whole = rng.choice((torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8))
    if kind < 3:
        return Labels(f"ids of {whole}", ids.to(whole), rows)
    if kind == 3:
        return Labels("[N, 1]", ids[:, None].to(whole), rows)
    if kind == 4:
        form = rng.choice((torch.int64, torch.bool, torch.float16, torch.float64, torch.uint8))
        return Labels(f"one-hot of {form}", one_hot.to(form), rows)
    if kind == 5:
        soft = torch.rand(len(ids), CLASSES, generator=generator, dtype=torch.float64).softmax(1)
        form = rng.choice((torch.float32, torch.float64))
        return Labels(f"probabilities of {form}", soft.to(form), soft)
    if kind == 6:
        some = ids.clone()
        chosen = rng.sample(range(len(ids)), rng.randint(1, len(ids)))
        some[chosen] = NONE
        rows = rows.clone()
        rows[chosen] = 0
        return Labels("some -100", some, rows)
    if kind == 7:
        wrong = ids.clone()
        wrong[rng.randrange(len(ids))] = rng.choice((CLASSES, -1, 10**6))
        # One image of a class that does not exist is one without a label to who reads none.
        return Labels("out of range", wrong, rows, refused=True)
    if kind == 8:
        return Labels("floats", ids.float() + 0.5, rows, refused=True)
    if kind == 9:
        return Labels("too many columns", F.one_hot(ids, CLASSES + 2), rows, refused=True)
    if kind == 10:
        return Labels("no distribution", one_hot * 0.5, rows, refused=True)
    return Labels("three axes", ids.view(-1, 1, 1), rows, refused=True)


PACKINGS: dict[str, Callable[[Tensor, Any], Any]] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "mapping": lambda x, y: {"image": x, "label": y, "path": ["a"] * len(x)},
    "Hugging Face": lambda x, y: {"pixel_values": x, "labels": y},
    "named tuple": lambda x, y: Named(x, y),
    "dataclass": lambda x, y: Sample(x, y),
    "DALI": lambda x, y: [{"data": x, "label": y}],
    "with ids": lambda x, y: (x, y, torch.arange(len(x))),
    "with more": lambda x, y: (x, y, ["path"] * len(x), {"box": 3}),
    "numpy": lambda x, y: (x.float().numpy(), y.numpy()),
}


class Again:
    """Begins anew with every iter()."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class Once(Again):
    """Gives everything the first time only, and says nothing of it."""

    def __init__(self, items: list[Any]) -> None:
        super().__init__(items)
        self.left = iter(items)

    def __iter__(self) -> Iterator[Any]:
        return self.left


class Unsized:
    """Has no length."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def _unbatched(items: list[Any]) -> DataLoader[Any]:
    return DataLoader(items, batch_size=None)  # type: ignore[arg-type]


CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "a list": list,
    "a tuple": tuple,
    "an object": Again,
    "a DataLoader": _unbatched,
}
# What is wrong besides the labels, from images, labels and items.
WRONG: dict[str, Callable[[Tensor, Any, list[Any]], Any]] = {
    "empty": lambda x, y, items: [],
    "a generator": lambda x, y, items: (item for item in items),
    "read once": lambda x, y, items: Once(items),
    "no length": lambda x, y, items: Unsized(items),
    "no loader": lambda x, y, items: 7,
    "images of integers": lambda x, y, items: [((x.float() * 50).to(torch.uint8), y)],
    "channels last": lambda x, y, items: [(torch.zeros(len(x), 8, 8, 3), y)],
    "one image without a batch": lambda x, y, items: [(x[0], y[0])],
    "images in a list": lambda x, y, items: [(list(x), y)],
    "labels missing one": lambda x, y, items: [(torch.cat([x, x[:1]]), y)],
    "no images in a batch": lambda x, y, items: [(x[:0], y[:0])],
    "text": lambda x, y, items: [("images", y)],
    "drop_last drops all": lambda x, y, items: DataLoader(
        TensorDataset(x, torch.as_tensor(y)), batch_size=len(x) + 1, drop_last=True
    ),
}
