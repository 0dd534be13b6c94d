"""What `fastkd.distill` gives back: both networks, predictions, the teacher's accuracy, words."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import fastkd
from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data.facts import Facts
from fastkd.data.loaders.foreign import ForeignLoader
from fastkd.errors import UserError
from fastkd.losses import AT, KD, BinaryCrossEntropy, CrossEntropy
from fastkd.storage.weights import load_into
from fastkd.teachers.judging import judge
from fastkd.teachers.loaded import LoadedNet
from fastkd.teachers.teacher import Teacher
from fastkd.training.config import OptimConfig
from fastkd.training.result import Result

QUIET: dict[str, Any] = {"device": "cpu", "compile": "off", "precision": "fp32", "quiet": True}
CPU = World(0, 0, 1, torch.device("cpu"), None)


class Net(nn.Module):
    def __init__(self, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(width, classes)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.head(self.drop(self.body(images_NCHW).mean((2, 3))))


def net(seed: int, **options: int) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def samples(num: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(num) % 4
    images_NCHW = torch.randn(num, 3, 8, 8, generator=generator)
    images_NCHW[torch.arange(num), labels_N % 3] += 0.5 + 0.3 * labels_N[:, None, None]
    return TensorDataset(images_NCHW, labels_N)


TRAIN = DataLoader(samples(64, 1), batch_size=16, shuffle=True)
VAL_DATA = samples(35, 2)
VAL = DataLoader(VAL_DATA, batch_size=16)
IMAGES, LABELS = VAL_DATA.tensors
# At a rate that makes the accuracy jump up and down.
WILD = OptimConfig(lr=0.5, schedule="constant")


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def accuracy(model: nn.Module) -> float:
    with torch.no_grad():
        return (model.eval()(IMAGES).argmax(1) == LABELS).double().mean().item()


def wild(**options: Any) -> tuple[Result, list[dict[str, Tensor]], list[dict[str, Any]]]:
    """A run, with what its student was at the end of each epoch."""
    student, seen, rows = net(2), list[dict[str, Tensor]](), list[dict[str, Any]]()

    def on_epoch(row: dict[str, Any]) -> None:
        seen.append(weights(student))
        rows.append(row)

    result = fastkd.distill(
        student, net(1), TRAIN, VAL, epochs=5, optim=WILD, on_epoch=on_epoch, **QUIET | options
    )
    return result, seen, rows


@pytest.fixture(scope="module")
def result() -> Result:
    return wild()[0]


@pytest.mark.parametrize("kept_in", ["memory", "folder"])
def test_best_is_the_network_of_the_best_row(kept_in: str, tmp_path: Path) -> None:
    out = tmp_path / "run" if kept_in == "folder" else None
    result, seen, rows = wild(out=out)
    reached = [row["val_accuracy"] for row in rows]
    best = reached.index(max(reached))
    assert best < len(reached) - 1, "the last epoch is the best: nothing is tested"
    assert result.metrics["best_epoch"] == best + 1
    assert same(result.best.state_dict(), seen[best])
    assert same(result.student.state_dict(), seen[-1])
    assert not same(seen[best], seen[-1])
    assert accuracy(result.best) == pytest.approx(max(reached))
    assert result.best is result.best
    assert result.best is not result.student
    assert not result.best.training
    assert result.history == rows
    other = net(7)
    load_into(other, result.best_weights)
    assert same(other.state_dict(), seen[best])


def test_best_of_an_average_is_an_average() -> None:
    result, seen, _ = wild(ema=0.9)
    assert accuracy(result.best) == pytest.approx(result.metrics["accuracy_best"])
    assert accuracy(result.student) == pytest.approx(result.metrics["accuracy_last"])
    assert not any(same(result.best.state_dict(), one) for one in seen)


class Pinned(Net):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("holds a lock")


def test_a_network_that_cannot_be_copied_leaves_its_best_weights() -> None:
    torch.manual_seed(2)
    student, seen = Pinned(), list[dict[str, Tensor]]()
    result = fastkd.distill(
        student,
        None,
        TRAIN,
        VAL,
        epochs=3,
        losses=[CrossEntropy()],
        optim=WILD,
        on_epoch=lambda row: seen.append(weights(student)),
        **QUIET,
    )
    with pytest.raises(UserError, match=r"cannot be copied \(holds a lock\).*load_into\(network"):
        _ = result.best
    load_into(student, result.best_weights)
    assert same(weights(student), seen[result.metrics["best_epoch"] - 1])


@dataclass
class Packed:
    label: Tensor
    image: Tensor


class NoMemory:
    """What a data set says in a worker that gets no memory."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, at: int) -> Any:
        raise OSError("Cannot allocate memory")


class Bare:
    """Batches of images alone, from a class that knows no data set."""

    def __iter__(self) -> Any:
        return iter(IMAGES.split(9))


IDS = TensorDataset(IMAGES, LABELS, torch.arange(35))
LOADERS = {
    "the validation loader": VAL,
    "one batch": DataLoader(VAL_DATA, batch_size=64),
    "ids": DataLoader(IDS, batch_size=4),
    "workers": DataLoader(VAL_DATA, batch_size=8, num_workers=1),
    "images alone": DataLoader(IMAGES, batch_size=10),  # type: ignore[arg-type]
    "tuples of one": DataLoader(TensorDataset(IMAGES), batch_size=10),
    "batch sampler": DataLoader(
        VAL_DATA, batch_sampler=BatchSampler(SequentialSampler(VAL_DATA), 6, drop_last=False)
    ),
    "drop_last where all fits": DataLoader(VAL_DATA, batch_size=5, drop_last=True),
    "a list": [[IMAGES[:20], LABELS[:20]], [IMAGES[20:], LABELS[20:]]],
    "a generator": (images for images in IMAGES.split(3)),
    "a class": Bare(),
    "a tensor": IMAGES,
    "float64": DataLoader(IMAGES.double(), batch_size=10),  # type: ignore[arg-type]
    "mappings": [{"pixel_values": IMAGES[:20]}, {"pixel_values": IMAGES[20:], "label": LABELS}],
    "labels first": [{"labels": LABELS, "image": IMAGES}],
    "a dataclass": [Packed(LABELS, IMAGES)],
    "as DALI": [[{"data": IMAGES, "label": LABELS}]],
    "numpy": [(IMAGES[:9].numpy(), LABELS), IMAGES[9:].double().numpy()],
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_predictions_are_the_networks_own(result: Result, loader: Any) -> None:
    state = torch.get_rng_state()
    found_NC = result.predict(loader)
    assert torch.get_rng_state().equal(state)
    assert (found_NC.dtype, found_NC.device.type) == (torch.float32, "cpu")
    with torch.no_grad():
        torch.testing.assert_close(found_NC, result.student(IMAGES), rtol=1e-5, atol=1e-6)
    assert not result.student.training


def test_predictions_of_the_best_epoch_and_as_probabilities(result: Result) -> None:
    with torch.no_grad():
        logits_NC = result.best(IMAGES)
    torch.testing.assert_close(result.predict(VAL, best=True), logits_NC)
    found_NC = result.predict(VAL, best=True, probabilities=True)
    torch.testing.assert_close(found_NC, torch.softmax(logits_NC, 1))
    hits_N = found_NC.argmax(1) == LABELS
    assert hits_N.double().mean().item() == pytest.approx(result.metrics["accuracy_best"])


def test_predictions_are_made_in_the_runs_precision() -> None:
    result, *_ = wild(precision="bf16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected_NC = result.student(IMAGES.bfloat16()).float()
    found_NC = result.predict(VAL)
    torch.testing.assert_close(found_NC, expected_NC, rtol=1e-2, atol=1e-2)
    in_fp32_NC = result.student(IMAGES)
    assert (found_NC - in_fp32_NC).abs().max() > 0
    hits_N = found_NC.argmax(1) == LABELS
    assert hits_N.double().mean().item() == pytest.approx(result.metrics["accuracy_last"])


def test_predictions_in_training_mode_and_of_several_labels() -> None:
    labels_NC = (torch.arange(64)[:, None] >> torch.arange(4) & 1).float()
    data = DataLoader(TensorDataset(samples(64, 1).tensors[0], labels_NC), batch_size=16)
    result = fastkd.distill(
        net(3), None, data, data, epochs=1, losses=[BinaryCrossEntropy()], **QUIET
    )
    result.student.train()
    found_NC = result.predict(data, probabilities=True)
    assert all(module.training for module in result.student.modules())
    with torch.no_grad():
        expected_NC = result.student.eval()(samples(64, 1).tensors[0]).sigmoid()
    torch.testing.assert_close(found_NC, expected_NC)
    assert "mAP" in repr(result)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("images", "ranks"), [(35, 2), (33, 4), (32, 4)])
def test_each_process_predicts_its_share_without_the_filling(
    result: Result, images: int, ranks: int, drop_last: bool
) -> None:
    data, rows = Subset(VAL_DATA, range(images)), torch.full((images, 4), torch.nan)
    for rank in range(ranks):
        sampler = DistributedSampler(data, ranks, rank, shuffle=False, drop_last=drop_last)
        loader = DataLoader(data, batch_size=4, sampler=sampler)
        if drop_last and images % ranks:
            with pytest.raises(UserError, match=rf"leaves out {images % ranks} of {images}"):
                result.predict(loader)
            return
        rows[rank::ranks] = result.predict(loader)
    with torch.no_grad():
        torch.testing.assert_close(rows, result.student(IMAGES[:images]))


REFUSED = {
    "shuffle": (DataLoader(VAL_DATA, batch_size=8, shuffle=True), "shuffles .RandomSampler"),
    "subset at random": (
        DataLoader(VAL_DATA, batch_size=8, sampler=SubsetRandomSampler(range(9))),
        "shuffles .SubsetRandomSampler",
    ),
    "weighted": (
        DataLoader(VAL_DATA, batch_size=8, sampler=WeightedRandomSampler([1.0] * 35, 35)),
        "shuffles .WeightedRandomSampler",
    ),
    "shuffled share": (
        DataLoader(VAL_DATA, batch_size=8, sampler=DistributedSampler(VAL_DATA, 2, 0)),
        "shuffles .DistributedSampler",
    ),
    "drop_last": (
        DataLoader(VAL_DATA, batch_size=8, drop_last=True),
        r"leaves out the last 3 of 35 \(drop_last=True\)",
    ),
    "single images": (DataLoader(VAL_DATA, batch_size=None), r"got \[3, 8, 8\]"),
    "bytes": ([(IMAGES.byte(), LABELS)], r"got \[35, 3, 8, 8\] of torch.uint8"),
    "dicts": ([{"scan": IMAGES}], "got dict with the keys scan, of which none can be the images"),
    "workers": (DataLoader(NoMemory(), num_workers=1), "a worker of the data loader ended: .*room"),
    "nothing": ([], "yields no image"),
    "empty tuples": ([()], "images alone, got tuple; wrap it in a class"),
    "one image": (IMAGES[0], r"got \[3, 8, 8\]"),
}


@pytest.mark.parametrize(("loader", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_predicted_is_said(result: Result, loader: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        result.predict(loader)


def test_the_teacher_is_evaluated_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    taught = fastkd.distill(
        net(3, width=16), None, TRAIN, VAL, epochs=8, losses=[CrossEntropy()], **QUIET
    ).student
    reached = accuracy(taught)
    assert reached > 0.5
    result = fastkd.distill(net(2), taught, TRAIN, VAL, epochs=1, **QUIET | {"quiet": False})
    assert result.teacher_accuracy == pytest.approx(reached)
    assert result.metrics["teacher"] == {"name": "Net", "accuracy": result.teacher_accuracy}
    said = capsys.readouterr().out
    assert said.startswith(f"teacher Net: accuracy {reached:.2%}\n")
    assert f"teacher   Net {reached:.2%}" in repr(result)


def constant(label: int) -> nn.Module:
    """Answers every image with one class."""
    model = net(5)
    nn.init.zeros_(model.head.weight)
    model.head.bias.data = 4.0 * nn.functional.one_hot(torch.tensor(label), 4)
    return model


@pytest.mark.parametrize(
    ("teacher", "losses"),
    [
        (constant(0), None),
        (constant(3), [KD(temperature=2.0)]),
        (constant(1), [CrossEntropy(), AT(pairs={"body": "body"})]),
        ([constant(2), constant(2)], None),
    ],
    ids=["kd", "hotter", "features", "several"],
)
@pytest.mark.parametrize("quiet", [False, True])
def test_a_teacher_at_chance_is_a_warning(teacher: Any, losses: Any, quiet: bool) -> None:
    with pytest.warns(
        UserWarning, match=r"than chance \(25\.71%\) on the 35 .*: accuracy 2\d\."
    ) as said:
        result = fastkd.distill(
            net(2), teacher, TRAIN, VAL, epochs=1, losses=losses, **QUIET | {"quiet": quiet}
        )
    assert {Path(one.filename).name for one in said} == {"test_result.py"}
    first = teacher[0] if isinstance(teacher, list) else teacher
    assert result.teacher_accuracy == pytest.approx(accuracy(first))


@pytest.mark.parametrize(("label", "warns"), [(0, True), (3, True), (None, False)])
def test_a_teacher_that_always_names_the_commonest_class_is_at_chance(
    label: int | None, warns: bool
) -> None:
    """Of 40 validation images 28 are of class 0, so naming it is right far more often than 1/4."""
    labels = torch.tensor([0] * 28 + [1] * 4 + [2] * 4 + [3] * 4)
    images = torch.zeros(40, 3, 8, 8) + labels[:, None, None, None]

    class Knows(nn.Module):
        def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
            return 9.0 * nn.functional.one_hot(images_NCHW.mean((1, 2, 3)).round().long() % 4, 4)

    teacher = Knows() if label is None else constant(label)
    val = [(images[start : start + 16], labels[start : start + 16]) for start in (0, 16, 32)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fastkd.distill(net(2), teacher, TRAIN, val, epochs=1, losses=[KD()], **QUIET)
    words = [str(one.message) for one in said if "not clearly better" in str(one.message)]
    assert bool(words) == warns
    assert all("than chance (70.00%) on the 40 validation images" in one for one in words)


def test_several_teachers_are_judged_alone_and_together() -> None:
    teachers = [net(seed) for seed in (11, 12, 13)]
    result = fastkd.distill(net(2), teachers, TRAIN, VAL, epochs=1, **QUIET)
    teacher = result.metrics["teacher"]
    assert [one["accuracy"] for one in teacher["members"]] == pytest.approx(
        [accuracy(one) for one in teachers]
    )
    with torch.no_grad():
        mean_NC = torch.stack([one(IMAGES).softmax(1) for one in teachers]).mean(0)
    expected = (mean_NC.argmax(1) == LABELS).double().mean().item()
    assert result.teacher_accuracy == pytest.approx(expected)


def test_a_teacher_of_other_answers_is_not_judged() -> None:
    said = list[str]()
    placement = Placement(CPU, Precision("fp32", "cpu"))
    normal = ((0.0,) * 3, (1.0,) * 3)
    facts = Facts((3, 8, 8), 4, LABELS, "class", normal)
    bound = Teacher(LoadedNet(net(1, classes=7)), {}, placement, data_normalization=normal)
    loader = ForeignLoader(VAL, placement, 0, train=False)
    found = judge(bound, "embedder", loader, facts, placement, say=said.append)
    assert found == {"name": "embedder"}
    assert said == ["teacher embedder: not evaluated, it gives (7,) per image and not 4 classes"]


def test_a_teacher_that_no_loss_asks_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    given = QUIET | {"quiet": False}
    result = fastkd.distill(net(2), net(1), TRAIN, VAL, epochs=1, losses=[CrossEntropy()], **given)
    assert result.metrics["teacher"] is None
    assert result.teacher_accuracy is None
    assert "the teacher is not used: none of the losses" in capsys.readouterr().out


def test_a_result_is_five_lines(result: Result) -> None:
    metrics, lines = result.metrics, repr(result).splitlines()
    assert lines[0] == "Result of distill: Net"
    last, best = (f"{metrics[f'accuracy_{which}']:.2%}" for which in ("last", "best"))
    assert lines[1] == f"  accuracy  last {last}, best {best} (epoch {metrics['best_epoch']})"
    assert re.fullmatch(r"  training  5 epochs in \d+:\d\d, [\d,]+ images/s", lines[3])
    assert lines[4].startswith("  folder    none (out=FOLDER")
    assert len(lines) == 5
    assert str(result) == repr(result)


def test_a_notebook_shows_the_same_as_a_table(result: Result) -> None:
    html = result._repr_html_()
    text = re.sub(r"<[^>]*>", " ", html)
    for line in repr(result).splitlines():
        for word in line.split():
            assert word in text
    assert html.count("<tr>") == html.count("</tr>") == 4

    class Odd(Net):
        pass

    Odd.__name__ = "<script>"
    odd = Result(Odd(), result.metrics, Path("a&b"), result.placement)
    assert "<script>" not in odd._repr_html_()
    assert "a&amp;b" in odd._repr_html_()
