"""What `fastkd.distill` refuses, in one sentence and before it writes anything."""

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import fastkd
import fastkd.losses
from fastkd.compute.ranks import World
from fastkd.data.loaders.foreign import check_loader
from fastkd.errors import UserError
from fastkd.losses import AT, CRD, DKD, KD, CrossEntropy, JointRD, KDLoss, ReviewKD, SimKD
from fastkd.losses.base.term import LossTerm, TermInputs, TermOutput
from fastkd.training.call_folder import digested

QUIET: dict[str, Any] = {"device": "cpu", "compile": "off", "precision": "fp32", "quiet": True}


def network(num_classes: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def images(num: int) -> tuple[Tensor, Tensor]:
    return torch.randn(num, 3, 8, 8), torch.arange(num) % 4


LOADER = DataLoader(TensorDataset(*images(20)), batch_size=8)


def distill(
    teacher: Any = None, train: Any = LOADER, val: Any = LOADER, student: Any = None, **options: Any
) -> Any:
    given = {"epochs": 1} | QUIET | options
    return fastkd.distill(student or network(), teacher, train, val, **given)


class Counts(LossTerm):
    """Wants to know which image is which."""

    def __init__(self) -> None:
        super().__init__("counts", ("x/student/logits",), {"counts": 1.0})
        self.uses_index = True

    def forward(self, inputs: TermInputs) -> TermOutput:
        return TermOutput({"counts": inputs.tensors["x/student/logits"].mean()})


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return zip(*images(20), strict=True)


class Labelled(TensorDataset):
    targets = images(20)[1]


class Numbered(TensorDataset):
    """Yields an id with every image; what it calls targets, and the ids, may be wrong."""

    def __init__(self, targets: Any = Labelled.targets, step: int = 1, first: int = 0) -> None:
        super().__init__(*images(20), torch.arange(20) * step + first)
        self.targets = targets


def numbered(*wrong: Any) -> dict[str, Any]:
    """A loss with a bank, and a data set with such targets and ids, in order."""
    train = DataLoader(Numbered(*wrong), batch_size=8)
    crd = CRD(pairs={"4": "4"}, negatives=5, dim=4)
    return {"teacher": network(), "train": train, "losses": [CrossEntropy(), crd]}


FLAT = DataLoader(TensorDataset(torch.zeros(20, 5), torch.zeros(20).long()), batch_size=16)
XPRIME = {"losses": [KD(views=("x", "xprime"))]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": [KD()]}, "teacher is None"),
        (
            {"teacher": network(7), "losses": [KD()]},
            r"the teacher gives logits of shape \(7,\).*4 classes",
        ),
        ({"teacher": network(), **XPRIME}, "give xprime='cutmix'"),
        ({"losses": [Counts()]}, r"the loss counts needs the label.*`targets`"),
        (
            {"losses": [Counts()], "train": DataLoader(Labelled(*images(20)), batch_size=8)},
            r"counts .*yield \(images, labels, sample ids\)",
        ),
        (numbered(Labelled.targets, 1, 4), "crd keeps state for 20 .* the sample id 20: yield"),
        (numbered(Labelled.targets, 2), "the sample 2 comes with the label 1, .* say 2"),
        (numbered(Labelled.targets, 1, -1), "crd keeps state for 20 samples.* the sample id -1"),
        (numbered(Labelled.targets[:18]), "crd keeps state for 18 samples.* the sample id 18: "),
        (
            numbered((Labelled.targets + 1) % 4),
            r"sample 0 comes with the label 0, but the dataset's `targets`.* crd uses, say 1: make",
        ),
        # One wrong label, in the last batch.
        (numbered([*range(4)] * 4 + [0, 1, 2, 0]), "the sample 19 comes with the label 3"),
        (numbered(Labelled.targets, 0.5), "sample ids must be whole numbers.* of torch.float32"),
        (
            numbered(Labelled.targets * 2),
            "crd needs the label of .*the label 4 is not a class of a",
        ),
        (numbered(["a cat"] * 20), "crd needs the label of every training sample.*str"),
        (numbered(torch.zeros(20, 4)), r"as it yields them; it has \[20, 4\]"),
        (
            {"teacher": network(), "losses": [AT(pairs={"logit": "2"})]},
            "unknown tap 'logit'.*nearest: logits",
        ),
        (
            numbered() | {"losses": [CRD()]},
            r"the loss crd, of the student: unknown tap 'pooled'.* Name another by CRD\(pairs=..\)"
            r", in a recipe losses.crd.pairs$",
        ),
        (
            {"teacher": network(), "losses": [ReviewKD(student=("1", "2"), teacher=("1", "no"))]},
            r"the loss reviewkd, of the teacher: unknown tap 'no'.*Name .* ReviewKD\(teacher=..\)",
        ),
        (
            {"teacher": network(), "losses": [SimKD()]},
            r"the loss simkd, of the student: unknown tap 'stage3'.* by SimKD\(student=..\)",
        ),
        (
            {"teacher": network(), "losses": [JointRD()]},
            "jointrd sends .* only networks of the zoo expose, and Sequential is not one",
        ),
        ({"train": FLAT, "val": FLAT}, r"\[N, C, H, W\].* got \[16, 5\]"),
        ({"train": (batch for batch in LOADER)}, "needs a length"),
        ({"train": DataLoader(Stream(), batch_size=4)}, "needs a length"),
        ({"train": iter(LOADER)}, "can be read only once"),
        ({"val": []}, "val_loader needs a length above 0"),
        (
            {"val": [{"picture": images(8)[0]}]},
            "must yield .*, got dict with the keys picture, of which none can be the images",
        ),
        ({"train": [{"image": images(8)[0]}]}, "yields images alone, and the loss ce reads lab"),
        ({"val": [(torch.zeros(8, 3, 8, 8).byte(), torch.zeros(8).long())]}, "floating point"),
        ({"precision": "bf32"}, "precision='bf32'; choose one of auto, bf16"),
        ({"compile": "yes"}, "compile='yes'; choose one of auto, on, off"),
        ({"resume": True}, "resume=True needs out="),
        ({"accumulate": 0}, "accumulate=0; expected a whole number above 0"),
        ({"accumulate": 2.5}, "accumulate=2.5; expected a whole number above 0"),
        ({"epochs": 0}, "epochs=0; expected a whole number above 0"),
        ({"ema": 1.5}, "ema=1.5; expected a decay from 0 to below 1"),
        ({"lr": -1.0}, "distill: lr=-1.0: expected a number above 0"),
        ({"losses": [KDLoss()]}, r"KDLoss is a function of logits.* the same loss is KD\(temp"),
        ({"losses": [KD]}, r"losses=\[KD\] has a class; call it, as in \[KD\(\)\]"),
        ({"losses": KD()}, r"losses=KD\(..\); expected a list, such as \[KD\(\)\]"),
        ({"losses": KD}, r"losses=KD; expected a list, such as \[KD\(\)\]"),
        ({"losses": [nn.CrossEntropyLoss()]}, r"losses has CrossEntropyLoss\(..\); expected Loss"),
        ({"losses": ["kd"]}, "losses has 'kd'; expected LossTerms, such as"),
        ({"student": "resnet8"}, "student: got 'resnet8'; expected a network.*create_model"),
        ({"teacher": "resnet8"}, "teacher: got 'resnet8'; expected a network.*create_model"),
        ({"losses": []}, r"losses=\[\] would train nothing"),
        ({"train": [(images(8)[0], torch.rand(8))]}, r"labels must be .*\[8\] of torch.float32"),
        ({"train": [(images(8)[0], [0] * 8)]}, "labels must be .*; got list: make it a tensor"),
        (
            {"train": [(images(8)[0], torch.arange(8))]},
            "label 4 is not a class of a network with 4",
        ),
        ({"val": [(images(8)[0], torch.arange(8) - 1)]}, "label -1 is not a class of a network wi"),
        (
            {
                "train": [(images(8)[0], torch.full((8,), -100))],
                "teacher": network(),
                "losses": [KD(), DKD()],
            },
            "the loss dkd needs the class of every image, and some are labelled -100",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_no_folder(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"losses": [CrossEntropy()]} | options
    if "resume" not in options:
        given["out"] = tmp_path / "run"
    with pytest.raises(UserError, match=message):
        distill(**given)
    assert not (tmp_path / "run").exists()


def test_what_was_written_is_not_overwritten(tmp_path: Path) -> None:
    first = distill(losses=[CrossEntropy()], out=tmp_path / "run")
    assert first.run_dir == tmp_path / "run"
    with pytest.raises(UserError, match="exists and is not empty"):
        distill(losses=[CrossEntropy()], out=tmp_path / "run")


def shared(dataset: Any, sampler: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=4, sampler=sampler)


def test_ranks_count_every_validation_image_once() -> None:
    world = World(1, 1, 2, torch.device("cpu"), None)
    eleven, twelve = (TensorDataset(*images(num)) for num in (11, 12))
    padded, even = (DistributedSampler(data, 2, 1) for data in (eleven, twelve))
    check_loader("val_loader", shared(twelve, even), world, exact=True)
    check_loader("val_loader", shared(eleven, range(1, 11, 2)), world, exact=True)
    check_loader("train_loader", shared(eleven, padded), world)
    mine = DataLoader(eleven, batch_sampler=[[1, 3, 5], [7, 9]])  # type: ignore[arg-type]
    check_loader("train_loader", mine, world)
    with pytest.raises(
        UserError, match=r"twice or not at all: .* of 11: pass sampler=range\(rank, "
    ):
        check_loader("val_loader", shared(eleven, padded), world, exact=True)
    with pytest.raises(
        UserError, match=r"gives each of the 2 processes all.*sampler=range\(rank, "
    ):
        check_loader("val_loader", LOADER, world, exact=True)
    with pytest.raises(UserError, match=r"all images: pass sampler=.*DistributedSampler"):
        check_loader("train_loader", LOADER, world)


def finished(out: Path, *losses: LossTerm, frozen: bool = False, resume: bool = False) -> Any:
    student = network()
    student[0].requires_grad_(not frozen)  # type: ignore[index]
    torch.manual_seed(7)  # the same teacher in every call
    return distill(network(), student=student, losses=losses, out=out, resume=resume)


def test_a_missing_loss_is_named_once(tmp_path: Path) -> None:
    two = [KD(), AT(pairs={"2": "2"})]
    finished(tmp_path / "two", *two)
    with pytest.raises(UserError, match=r"with other arguments \(losses\.at: there, not here\)"):
        finished(tmp_path / "two", KD(), resume=True)
    finished(tmp_path / "one", KD())
    with pytest.raises(UserError, match=r"with other arguments \(losses\.at: here, not there\)"):
        finished(tmp_path / "one", *two, resume=True)


@pytest.mark.parametrize(
    ("losses", "frozen"),
    [
        ([KD(temperature=2.0)], False),
        ([KD(label_smoothing=0.1)], False),
        ([KD(standardize=True)], False),
        ([KD()], True),
    ],
    ids=["temperature", "smoothing", "standardize", "frozen"],
)
def test_a_run_does_not_go_on_as_another(
    losses: Sequence[LossTerm], frozen: bool, tmp_path: Path
) -> None:
    finished(tmp_path, KD())
    finished(tmp_path, KD(), resume=True)
    with pytest.raises(UserError, match="belongs to a run with other arguments"):
        finished(tmp_path, *losses, frozen=frozen, resume=True)


def test_a_network_does_not_teach_itself() -> None:
    student = network()
    for teacher in (student, [network(), student]):
        with pytest.raises(UserError, match=r"student and teacher are one object, .*deepcopy"):
            distill(teacher, student=student)
    body = nn.Sequential(*network(4)[:5])  # type: ignore[index]
    one, other = (nn.Sequential(body, nn.Linear(8, 4)) for _ in range(2))
    with pytest.raises(UserError, match="student and teacher share layers that are to be trained"):
        distill(one, student=other)
    assert all(parameter.requires_grad for parameter in other.parameters())
    body.requires_grad_(False)
    assert distill(one, student=other).metrics["skipped_steps"] == 0


@pytest.mark.parametrize("whole", [False, True], ids=["layers before the tap", "whole student"])
def test_a_loss_that_could_teach_nothing_is_refused(whole: bool) -> None:
    """Without a word such a run would end with the student it began with."""
    student = network()
    student[: 6 if whole else 2].requires_grad_(False)  # type: ignore[index]
    losses = [CrossEntropy()] if whole else [CrossEntropy(), AT(pairs={"2": "2"})]
    looks = "ce uses x/student/logits" if whole else "at uses x/student/2"
    with pytest.raises(UserError, match=f"{looks} of the student, which carries no gradient"):
        distill(network(), student=student, losses=losses)


PAIRS = {"a": "b", "c": "d"}


def other(value: Any) -> Any:
    """A value that differs, of the same kind; shares stay below 1."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 0.7 * value + 0.01


TERMS = [
    kind
    for name in fastkd.losses.__all__
    if isinstance(kind := getattr(fastkd.losses, name), type)
    and issubclass(kind, LossTerm)
    and kind is not LossTerm
]


@pytest.mark.parametrize("loss", TERMS, ids=lambda loss: loss.__name__)
def test_each_setting_of_a_loss_makes_another_run(loss: Any) -> None:
    """Or a run would go on with another temperature than it began with."""
    wanted = signature(loss).parameters
    pairs = {"a": "b"} if loss is CRD else PAIRS
    given: dict[str, Any] = {"pairs": pairs} if "pairs" in wanted else {}

    def facts(**changed: Any) -> Any:
        term = loss(**given | changed)
        return digested(term)

    numbers = [
        (name, parameter.default)
        for name, parameter in wanted.items()
        if isinstance(parameter.default, bool | int | float)
    ]
    assert numbers
    for name, value in numbers:
        assert facts(**{name: other(value)}) != facts(), name


def test_labels_of_any_width_are_compared_as_numbers() -> None:
    """260 classes are 4 to a uint8."""
    labels = torch.tensor([9, 200, 0, 0], dtype=torch.uint8)
    found = [(torch.randn(4, 3, 8, 8), labels)]
    options = {"student": network(260), "losses": [CrossEntropy()]}
    assert distill(None, found, found, **options).metrics["skipped_steps"] == 0
