"""Whatever a loader yields: the step is the formula's, in float64, or one sentence says why not.

One batch, one step of plain SGD, a linear student: its weights afterwards are compared with the
formula's.
"""

import re
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision.transforms import v2

import fastkd
from fastkd.errors import RunFailed, UserError
from fastkd.losses import CRD, DKD, KD, BinaryCrossEntropy, CrossEntropy, SoftCE
from fastkd.storage.weights import load_weights
from fastkd.training.config import OptimConfig

QUIET: dict[str, Any] = {"device": "cpu", "compile": "off", "precision": "fp32", "quiet": True}
SGD = OptimConfig(name="sgd", lr=0.5, momentum=0.0, weight_decay=0.0, schedule="constant")
X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(5))
IDS = torch.tensor([0, 1, 2, 3, 3, 2, 1, 1])
PLAIN = [(X, IDS)]
MIXED = 0.7 * F.one_hot(IDS, 4) + 0.3 * F.one_hot(IDS.roll(1), 4)


def net(seed: int, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, classes))


TEACHER = net(2).requires_grad_(False)


def stepped(train: Any, losses: Any, val: Any = PLAIN, **options: Any) -> Tensor:
    student, teacher = net(1, options.pop("classes", 4)), net(2)
    given: dict[str, Any] = {"epochs": 1, "losses": losses, "optim": SGD} | QUIET | options
    fastkd.distill(student, teacher, train, val, **given)
    return student[1].weight.detach()  # type: ignore[union-attr,return-value]


def formula(loss: Any, images: Tensor = X) -> Tensor:
    """The weights after one step on `loss` of the student's and the teacher's logits."""
    student, teacher = net(1).double(), net(2).double()
    weight: Any = student[1].weight
    value = loss(student(images.double()), teacher(images.double()).detach())
    return (weight - 0.5 * torch.autograd.grad(value, weight)[0]).detach().float()


def kl(s: Tensor, t: Tensor) -> Tensor:
    """T = 4, with T^2."""
    return 16 * F.kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction="batchmean")


def ce(s: Tensor, _: Tensor) -> Tensor:
    return F.cross_entropy(s, IDS)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, net(1)[1].weight, atol=1e-4)  # type: ignore[arg-type]


ONE_HOT = F.one_hot(IDS, 4)
Pair = namedtuple("Pair", "label image")


@dataclass
class Record:
    images: Tensor
    labels: Tensor


@pytest.mark.parametrize(
    "labels",
    [
        IDS.int(),
        IDS.to(torch.uint8),
        IDS.to(torch.int16),
        IDS.numpy(),
        IDS[:, None],
        IDS[:, None].to(torch.uint8),
        ONE_HOT,
        ONE_HOT.bool(),
        ONE_HOT.to(torch.uint8),
        ONE_HOT.half(),
        ONE_HOT.bfloat16(),
        ONE_HOT.double(),
        ONE_HOT.double().numpy(),
    ],
    ids=lambda labels: f"{labels.dtype}{list(labels.shape)}",
)
def test_labels_of_any_form_are_the_class_they_name(labels: Any) -> None:
    given = [(X, labels)]
    close(stepped(given, [CrossEntropy()], given), formula(ce))
    if len(labels.shape) == 1 or labels.shape[1] == 4:
        both = formula(lambda s, t: 0.9 * kl(s, t) + 0.1 * ce(s, t))
        close(stepped(given, [KD()], given), both)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_rows_of_probabilities_are_soft_targets(dtype: torch.dtype) -> None:
    rows = MIXED.to(dtype)

    def soft(s: Tensor, _: Tensor) -> Tensor:
        return -(rows.double() * s.log_softmax(1)).sum(1).mean()

    given = [(X, rows)]
    close(stepped(given, [CrossEntropy()]), formula(soft))
    close(stepped(given, [KD()]), formula(lambda s, t: 0.9 * kl(s, t) + 0.1 * soft(s, t)))
    close(
        stepped(given, [KD(standardize=False, ce_weight=0)]), formula(lambda s, t: 0.9 * kl(s, t))
    )


@pytest.mark.parametrize("mix", [v2.MixUp(num_classes=4), v2.CutMix(num_classes=4)])
@pytest.mark.parametrize(
    "losses", [[KD(ce_weight=0)], [SoftCE()], [CrossEntropy(), KD(ce_weight=0)]]
)
def test_a_mix_in_the_collate_function_meets_plain_validation(mix: Any, losses: Any) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def collate(samples: Any) -> Any:
        mixed = mix(*torch.utils.data.default_collate(samples))
        seen.append(mixed)
        return mixed

    loader = DataLoader(TensorDataset(X, IDS), batch_size=8, collate_fn=collate)
    found = stepped(loader, losses)
    images, rows = seen[-1]
    student, teacher = net(1).double(), net(2).double()
    weight: Any = student[1].weight
    s, t = student(images.double()), teacher(images.double()).detach()
    parts = {
        "kd": 0.9 * kl(s, t),
        "soft_ce": F.cross_entropy(s, t.softmax(1)),
        "ce": F.cross_entropy(s, rows.double()),
    }
    loss = torch.stack([parts[term.name] for term in losses]).sum()
    close(found, (weight - 0.5 * torch.autograd.grad(loss, weight)[0]).detach().float())


@pytest.mark.parametrize(
    "item",
    [
        {"image": X, "label": IDS},
        {"pixel_values": X, "labels": IDS, "path": ["a"] * 8},
        {"images": X.numpy(), "targets": IDS.numpy()},
        (X, IDS, ["a path"] * 8),
        (X, IDS, torch.arange(8), {"box": 1}),
        [X, IDS],
        [{"data": X, "label": IDS[:, None]}],
        Pair(IDS, X),
        Record(X, IDS),
        (X.numpy(), IDS),
        (X.contiguous(memory_format=torch.channels_last), IDS),
    ],
    ids=lambda item: type(item).__name__,
)
def test_items_of_any_packing_hold_the_same_batch(item: Any) -> None:
    close(stepped([item], [CrossEntropy()], [item]), formula(ce))


class Strings:
    """A data set whose second value is no label."""

    def __iter__(self) -> Any:
        yield X, ["a cat"] * 8

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    "train",
    [
        [(X, torch.full((8,), -100))],
        [(X, torch.full((8,), -1))],
        [(X, torch.full((8,), 900))],
        [X],
        [(X,)],
        [(X, None)],
        [{"image": X}],
        [(X, torch.rand(8, 9))],
        Strings(),
        DataLoader(TensorDataset(X), batch_size=8),
    ],
    ids=lambda train: type(train).__name__,
)
def test_a_loss_that_reads_no_labels_does_not_care_what_they_are(train: Any) -> None:
    close(stepped(train, [KD(ce_weight=0)]), formula(lambda s, t: 0.9 * kl(s, t)))
    close(stepped(train, [SoftCE()], None), formula(lambda s, t: F.cross_entropy(s, t.softmax(1))))


def test_an_image_without_a_label_counts_where_no_label_is_read() -> None:
    labels = IDS.clone()
    labels[[0, 3, 4, 7]] = -100
    known = labels >= 0
    losses = [KD(ce_weight=0), CrossEntropy(weight=0.1)]
    expected = formula(lambda s, t: 0.9 * kl(s, t) + 0.1 * F.cross_entropy(s[known], IDS[known]))
    close(stepped([(X, labels)], losses), expected)
    with pytest.raises(
        UserError, match=r"the loss kd needs the class .*KD\(ce_weight=0\), and Cro"
    ):
        stepped([(X, labels)], [KD()])


NONE = torch.full((8,), -100)


@pytest.mark.parametrize(
    ("train", "losses", "name"),
    [
        ([(X, NONE)], [CrossEntropy()], "ce"),
        ([(X, NONE), (X, NONE)], [CrossEntropy(label_smoothing=0.1)], "ce"),
        ([(X, -torch.ones(8, 4))], [BinaryCrossEntropy()], "bce"),
    ],
)
def test_an_epoch_in_which_nothing_counts_has_failed(train: Any, losses: Any, name: str) -> None:
    val = [(X, ONE_HOT)] if name == "bce" else PLAIN
    with pytest.raises(RunFailed, match=rf"nothing was learned in epoch 1: .*\({name} for one"):
        stepped(train, losses, val)
    part = [*train, (X, ONE_HOT if name == "bce" else IDS)]
    assert stepped(part, losses, val).isfinite().all()


def test_without_validation_the_last_epoch_is_kept(tmp_path: Path, capsys: Any) -> None:
    student = net(1)
    options = QUIET | {"quiet": False, "epochs": 3, "losses": [CrossEntropy()]}
    for number, val in enumerate((None, [X], DataLoader(TensorDataset(X), batch_size=4))):
        out = tmp_path / str(number)
        found = fastkd.distill(student, None, PLAIN, val, out=out, **options)
        assert "no accuracy is measured, and the last epoch is kept" in capsys.readouterr().out
        assert found.metrics["best_epoch"] == 3
        assert not [key for key in found.metrics if "accuracy" in key]
        assert not [key for row in found.metrics["history"] for key in row if key.startswith("val")]
        kept, facts = load_weights(out)
        assert facts["epoch"] == "3" and "accuracy" not in facts
        assert torch.equal(kept["1.weight"], student[1].weight)  # type: ignore[arg-type]


def test_validation_labels_may_be_rows_or_begin_without_one() -> None:
    val = [(X, NONE), (X, IDS)]
    student = net(1)
    found = fastkd.distill(student, None, PLAIN, val, epochs=1, losses=[CrossEntropy()], **QUIET)
    hits = (student(X).argmax(1) == IDS).float().mean().item()
    assert found.metrics["accuracy_last"] == pytest.approx(hits)
    for rows in (ONE_HOT, 0.6 * ONE_HOT + 0.1):
        student = net(1)
        found = fastkd.distill(
            student, None, PLAIN, [(X, rows)], epochs=1, losses=[CrossEntropy()], **QUIET
        )
        hits = (student(X).argmax(1) == IDS).float().mean().item()
        assert found.metrics["accuracy_last"] == pytest.approx(hits)
        assert found.metrics["history"][0]["val_loss"] == pytest.approx(
            F.cross_entropy(student(X), IDS).item(), rel=1e-5
        )


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return zip(X, IDS, strict=True)


class Counted(Stream):
    def __len__(self) -> int:
        return 8


class Once:
    """Holds one iterator; a second epoch would be empty."""

    def __init__(self, *, same: bool) -> None:
        self.items, self.same = iter([*PLAIN, *PLAIN]), same

    def __iter__(self) -> Any:
        return self.items if self.same else (item for item in self.items)

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_training_images_of_any_floating_type_are_cast(dtype: torch.dtype) -> None:
    rounded = X.to(dtype)
    close(stepped([(rounded, IDS)], [CrossEntropy()]), formula(ce, rounded))


def test_an_iterable_data_set_with_a_length_works() -> None:
    close(stepped(DataLoader(Counted(), batch_size=8), [CrossEntropy()]), formula(ce))


def test_sizes_may_differ_from_batch_to_batch() -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    train = [(torch.randn(n, 3, s, s), torch.arange(n) % 4) for n, s in ((8, 6), (5, 9), (3, 12))]
    found = fastkd.distill(student, None, train, PLAIN, epochs=2, losses=[CrossEntropy()], **QUIET)
    assert found.metrics["skipped_steps"] == 0
    assert found.metrics["history"][0]["images_per_s"] > 0


CE = {"losses": [CrossEntropy()]}
EMPTY = TensorDataset(X[:0], IDS[:0])


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        (
            [(X, IDS[:, None].float())],
            CE,
            r"train_loader: labels must .*: class ids are labels.squeeze\(1\).long\(\)$",
        ),
        ([(X, torch.rand(8, 4))], CE, r"the loss ce needs one class id per image"),
        ([(X, ONE_HOT * 2)], CE, "the loss ce needs one class id per image"),
        ([(X, MIXED)], {"losses": [DKD()]}, "need one class per image, and a row .* MixUp and"),
        ([(X, IDS.float())], CE, r"class ids are labels.long\(\)"),
        ([(X, F.one_hot(IDS, 6))], CE, r"one column per class, but the student gives 4 logits"),
        ([(X, IDS[:5])], CE, r"got \[5\] of torch.int64, for 8 images"),
        ([(X, IDS[:, None, None])], CE, r"labels must be .*got \[8, 1, 1\]"),
        ([(X, [IDS, IDS])], CE, "got list: make it a tensor"),
        ([(X, {"boxes": IDS})], CE, "got dict: make it a tensor"),
        ([(X, IDS + 1)], CE, "the label 4 is not a class of a network with 4"),
        ([X], CE, "train_loader yields images alone, and the loss ce reads labels"),
        ([{"image": X, "fine": IDS, "coarse": IDS}], CE, "yields images alone, and the loss ce"),
        ([{"image": X, "label": IDS, "target": IDS}], CE, "several can be the labels"),
        ([(X.permute(0, 2, 3, 1), IDS)], CE, r"channels last: images.permute\(0, 3, 1, 2\)"),
        ([(X.permute(0, 2, 3, 1).numpy(), IDS)], CE, r"channels last: images.permute"),
        (
            [((X * 255).byte(), IDS)],
            CE,
            r"got \[8, 3, 6, 6\] of torch.uint8: torchvision.s v2.ToDtype",
        ),
        ([([X[0], X[1]], IDS[:2])], CE, "got list of 2: stack .* in collate_fn"),
        ([(X[0], IDS[:1])], CE, "one image[?] give the DataLoader a batch_size"),
        ([(X[:0], IDS[:0])], CE, "^train_loader: .*a batch without images"),
        (["text"], CE, "train_loader: a loader must yield .*, got str"),
        ([()], CE, "a loader must yield .*, got tuple"),
        (DataLoader(Stream(), batch_size=4), CE, "needs a length.* IterableDataset a __len__"),
        (DataLoader(EMPTY, batch_size=4), CE, "needs a length above 0: its data set is empty"),
        (
            DataLoader(TensorDataset(X, IDS), batch_size=9, drop_last=True),
            CE,
            "its 8 images are fewer than batch_size=9, and drop_last=True drops",
        ),
        (Once(same=True), CE, "train_loader can be read only once"),
        (PLAIN, CE | {"val": Once(same=True)}, "val_loader can be read only once"),
        (
            PLAIN,
            CE | {"val": [(X, NONE), (X, NONE)]},
            r"no label \(all are -100\).*val_loader=N",
        ),
        (
            PLAIN,
            CE | {"val": [(X, ONE_HOT * 2)]},
            "another one .*: make them alike",
        ),
        (
            [(X, ONE_HOT)],
            {"losses": [BinaryCrossEntropy()], "val": [(X, -torch.ones(8, 4))]},
            "no positive label",
        ),
        (
            [(X, ONE_HOT)],
            {"losses": [BinaryCrossEntropy()], "val": [(X, 3 * ONE_HOT)]},
            "one of them is 3",
        ),
        (
            [(X, ONE_HOT)],
            {"losses": [BinaryCrossEntropy()], "val": PLAIN},
            "make them alike",
        ),
    ],
)
def test_what_cannot_be_used_is_said_before_the_first_step(
    train: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    student, before = net(1), net(1)[1].weight
    given = dict(options)
    val = given.pop("val", PLAIN)
    out = tmp_path / "run"
    with pytest.raises(UserError, match=message) as found:
        fastkd.distill(student, net(2), train, val, epochs=1, out=out, **given, **QUIET)
    assert "\n" not in re.sub(r"Tensor\(.*", "", str(found.value))
    assert torch.equal(student[1].weight, before)  # type: ignore[arg-type]
    assert not out.exists()


LATE = torch.cat([IDS, IDS + 1])


@pytest.mark.parametrize(
    "late",
    [
        [(X, IDS), (X, IDS + 1)],
        ((X, IDS), (X, torch.full((8,), -3))),
        DataLoader(TensorDataset(torch.cat([X, X]), LATE), batch_size=8),
    ],
    ids=["list", "tuple", "TensorDataset"],
)
@pytest.mark.parametrize("place", ["train_loader", "val_loader"])
def test_a_wrong_label_of_a_later_batch_is_found_too(late: Any, place: str) -> None:
    student, before = net(1), net(1)[1].weight
    train, val = (late, PLAIN) if place == "train_loader" else (PLAIN, late)
    with pytest.raises(
        UserError, match=f"{place}: the label .* is not a class of a network with 4"
    ):
        fastkd.distill(student, None, train, val, epochs=1, losses=[CrossEntropy()], **QUIET)
    assert torch.equal(student[1].weight, before)  # type: ignore[arg-type]


class Emptying:
    """A batch, then one without images."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Any:
        return iter([(X, IDS), (X[:0], IDS[:0])])


@pytest.mark.parametrize("late", [list(Emptying()), Emptying()], ids=["list", "loader"])
@pytest.mark.parametrize("place", ["train_loader", "val_loader"])
def test_an_empty_batch_names_its_loader_whenever_it_comes(late: Any, place: str) -> None:
    train, val = (late, PLAIN) if place == "train_loader" else (PLAIN, late)
    with pytest.raises(UserError, match=f"^{place}: images must be .* a batch without images"):
        fastkd.distill(net(1), None, train, val, epochs=1, losses=[CrossEntropy()], **QUIET)


def test_a_loader_that_ends_for_ever_is_found_when_it_does() -> None:
    with pytest.raises(UserError, match="yields nothing in epoch 2: it can be read only once"):
        stepped(Once(same=False), [CrossEntropy()], epochs=2)


def test_ids_and_one_hot_rows_go_together() -> None:
    """A bank keeps class ids; one-hot rows are such ids."""

    class Known(TensorDataset):
        targets = IDS

    crd = CRD(pairs={"1": "1"}, negatives=3, dim=4)
    loader = DataLoader(Known(X, ONE_HOT, torch.arange(8)), batch_size=4)
    assert stepped(loader, [CrossEntropy(), crd]).isfinite().all()
    assert torch.equal(crd.labels_M, IDS)


def test_arrays_of_numpy_stay_what_they_are() -> None:
    images, labels = X.numpy().copy(), IDS.numpy().copy()
    stepped([(images, labels)], [CrossEntropy()])
    assert np.array_equal(images, X.numpy()) and np.array_equal(labels, IDS.numpy())
