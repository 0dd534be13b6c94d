"""fastkd.distill with other people's networks and loaders: nothing here comes from the zoo."""

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fastkd
import fastkd.training.engine
from fastkd.compute.compiling import COMPILE_SECONDS, MACS_PER_SECOND, PAYS_FROM
from fastkd.data.loaders.foreign import images_per_epoch
from fastkd.errors import Interrupted, UserError
from fastkd.losses import AT, KD, CrossEntropy
from fastkd.losses.base.term import BindContext, LossTerm, TermInputs, TermOutput
from fastkd.models import count
from fastkd.storage.weights import load_weights
from fastkd.training.config import OptimConfig

QUIET: dict[str, Any] = {"device": "cpu", "compile": "off", "precision": "fp32", "quiet": True}


class Small(nn.Module):
    """In the style of torchvision: layers with names, pooling inside of forward."""

    def __init__(self, width: int = 8, num_classes: int = 4) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()
        )
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        features_NCHW = self.layer2(self.layer1(images_NCHW))
        return self.fc(self.dropout(torch.flatten(features_NCHW.mean((2, 3)), 1)))


def small(seed: int, **options: int) -> Small:
    torch.manual_seed(seed)
    return Small(**options)


def tensors(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four classes: a bright quarter of the image, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.arange(num) % 4
    images_NCHW = torch.randn(num, 3, 8, 8, generator=generator)
    for label in range(4):
        rows, columns = slice(4 * (label // 2), 4 * (label // 2) + 4), slice(4 * (label % 2), None)
        images_NCHW[labels_N == label, label % 3, rows, columns] += 2.0
    return images_NCHW, labels_N


@pytest.fixture(scope="module")
def train_loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors(120, 1)), batch_size=16, shuffle=True)


@pytest.fixture(scope="module")
def val_loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors(50, 2)), batch_size=16)


@pytest.fixture(scope="module")
def teacher(train_loader: DataLoader[Any], val_loader: DataLoader[Any]) -> nn.Module:
    taught = fastkd.distill(
        small(1, width=16),
        None,
        train_loader,
        val_loader,
        epochs=6,
        losses=[CrossEntropy()],
        **QUIET,
    )
    assert taught.metrics["accuracy_last"] > 0.8
    return taught.student


def accuracy(model: nn.Module, loader: DataLoader[Any]) -> float:
    with torch.no_grad():
        hits = [(model(images).argmax(1) == labels).float() for images, labels in loader]
    return torch.cat(hits).mean().item()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_five_lines(
    train_loader: DataLoader[Any],
    val_loader: DataLoader[Any],
    teacher: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = weights(teacher)
    student = small(2)
    result = fastkd.distill(student, teacher, train_loader, val_loader, epochs=6, **QUIET)
    assert result.student is student
    assert not student.training
    assert result.metrics["accuracy_last"] > 0.7
    assert accuracy(student, val_loader) == pytest.approx(result.metrics["accuracy_last"])
    assert [row["epoch"] for row in result.metrics["history"]] == [1, 2, 3, 4, 5, 6]
    # The defaults: 0.1 CE + 0.9 KL.
    row = result.metrics["history"][-1]
    assert row["train_loss"] == pytest.approx(0.1 * row["train_ce"] + 0.9 * row["train_kd"])
    assert result.run_dir is None
    assert list(tmp_path.iterdir()) == []
    assert same(weights(teacher), before)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_features_are_tapped_by_module_path(
    train_loader: DataLoader[Any], val_loader: DataLoader[Any], teacher: nn.Module
) -> None:
    def maps(student: nn.Module) -> float:
        """Distance of the attention maps, computed without fastkd."""
        found = []
        for net in (student, teacher):
            features_NCHW = net.layer2(net.layer1(tensors(50, 2)[0]))  # type: ignore[operator]
            found.append(nn.functional.normalize(features_NCHW.square().mean(1).flatten(1)))
        return (found[0] - found[1]).square().mean().item()

    student = small(2).eval()
    before = maps(student)
    losses = [CrossEntropy(), AT(pairs={"layer2": "layer2"}, weight=1000)]
    result = fastkd.distill(
        student, teacher, train_loader, val_loader, epochs=4, losses=losses, **QUIET
    )
    assert maps(result.student) < 0.7 * before
    rows = result.metrics["history"]
    assert rows[-1]["train_at"] < rows[0]["train_at"]
    hooks = [m for net in (student, teacher) for m in net.modules() if m._forward_hooks]
    assert hooks == []


class Numbered(Dataset[Any]):
    """Yields (x, y, index), as losses with a memory bank need it."""

    def __init__(self, num: int, seed: int) -> None:
        self.images_NCHW, self.targets = tensors(num, seed)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, int]:
        return self.images_NCHW[number], self.targets[number], number


class Remembers(LossTerm):
    """Cross entropy with the logits that the same image got an epoch ago."""

    banks = ("logits_KC",)
    uses_index = True
    logits_KC: Tensor
    labels_K: Tensor

    def __init__(self) -> None:
        super().__init__("remembers", ("x/student/logits",), {"remembers": 0.1})

    def bind(self, context: BindContext) -> None:
        self.register_buffer("logits_KC", torch.zeros(context.num_samples, context.num_classes))
        self.labels_K = context.train_labels_N

    def forward(self, inputs: TermInputs) -> TermOutput:
        logits_NC = inputs.tensors["x/student/logits"]
        assert torch.equal(self.labels_K[inputs.index_N], inputs.labels_N)
        target_NC = self.logits_KC[inputs.index_N].softmax(1)
        loss = nn.functional.cross_entropy(logits_NC, target_NC)
        return TermOutput({"remembers": loss}, {"logits": logits_NC})

    def commit(self, carry: Mapping[str, Tensor], index_N: Tensor, ok: Tensor) -> None:
        old_NC = self.logits_KC[index_N]
        self.logits_KC[index_N] = torch.where(ok, carry["logits"], old_NC)


def test_sample_ids_reach_the_loss(val_loader: DataLoader[Any]) -> None:
    loader = DataLoader(Numbered(60, 1), batch_size=16, shuffle=True)
    term = Remembers()
    result = fastkd.distill(
        small(2), None, loader, val_loader, epochs=2, losses=[CrossEntropy(), term], **QUIET
    )
    assert (term.logits_KC != 0).any(1).all()
    assert result.metrics["history"][1]["train_remembers"] > 0


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_both_networks_see_the_same_mixed_images(
    train_loader: DataLoader[Any], val_loader: DataLoader[Any], teacher: nn.Module, kind: Any
) -> None:
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    student = small(2)

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if module.training == (name == "student"):
                seen[name].append(args[0].clone())

        return hook

    handles = [
        net.layer1.register_forward_pre_hook(note(name))  # type: ignore[union-attr]
        for name, net in (("student", student), ("teacher", teacher))
    ]
    fastkd.distill(
        student,
        teacher,
        train_loader,
        val_loader,
        epochs=1,
        losses=[KD(views=("x", "xprime"))],
        xprime=kind,
        **QUIET,
    )
    for handle in handles:
        handle.remove()
    # Without those of the trials before training, which are of two.
    of_student, of_teacher = ([x for x in found if len(x) != 2] for found in seen.values())
    assert len(of_student) == 2 * len(train_loader)
    of_teacher = of_teacher[-len(of_student) :]  # it was evaluated before
    assert all(torch.equal(*pair) for pair in zip(of_student, of_teacher, strict=True))
    mixed = [not torch.equal(*of_student[i : i + 2]) for i in range(0, len(of_student), 2)]
    assert sum(mixed) >= 6  # of 8: a box may be empty


class Impatient(TensorDataset):
    """Random images; presses Ctrl-C when the n-th one is asked for."""

    left = -1

    def __getitem__(self, index: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        images_CHW, label = super().__getitem__(index)
        return images_CHW + 0.1 * torch.randn(3, 8, 8), label


@pytest.mark.parametrize("own_generator", [False, True], ids=["global", "own-generator"])
@pytest.mark.parametrize("ema", [None, 0.9], ids=["student", "average"])
def test_a_stopped_run_goes_on_bit_identical(
    val_loader: DataLoader[Any],
    teacher: nn.Module,
    tmp_path: Path,
    ema: float | None,
    own_generator: bool,
) -> None:
    def run(out: str, images_until_ctrl_c: int = -1, *, resume: bool = False) -> Any:
        images = Impatient(*tensors(120, 1))
        images.left = images_until_ctrl_c
        generator = torch.Generator().manual_seed(5) if own_generator else None
        loader = DataLoader(images, batch_size=16, shuffle=True, generator=generator)
        return fastkd.distill(
            small(2),
            teacher,
            loader,
            val_loader,
            epochs=3,
            optim=OptimConfig(name="adamw", lr=0.01, schedule="cosine"),
            losses=[KD(views=("x", "xprime"))],
            xprime="mixup",
            ema=ema,
            out=tmp_path / out,
            resume=resume,
            **QUIET,
        )

    whole = run("whole")
    # In the third batch of the second epoch of 8 batches, after a first look at 16 images.
    with pytest.raises(Interrupted, match=r"stopped at epoch 2, step 3; the state is saved\. To "):
        run("broken", 16 + 120 + 40)
    assert not (tmp_path / "broken" / "summary.json").exists()
    resumed = run("broken", resume=True)
    assert same(weights(resumed.student), weights(whole.student))
    assert resumed.run_dir == tmp_path / "broken"
    for one, other in zip(resumed.metrics["history"], whole.metrics["history"], strict=True):
        for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"):
            assert one[key] == other[key]
    names = {"best.safetensors", "last.pt", "metrics.jsonl", "metrics.csv", "summary.json"}
    assert names <= {file.name for file in (tmp_path / "broken").iterdir()}
    kept, facts = load_weights(tmp_path / "broken")
    small(5).load_state_dict(kept)
    assert float(facts["accuracy"]) == pytest.approx(resumed.metrics["accuracy_best"], abs=1e-6)


def test_the_seed_decides_the_order(
    train_loader: DataLoader[Any], val_loader: DataLoader[Any]
) -> None:
    def trained(seed: int) -> dict[str, Tensor]:
        student = small(2)
        fastkd.distill(
            student,
            None,
            train_loader,
            val_loader,
            epochs=1,
            losses=[CrossEntropy()],
            seed=seed,
            **QUIET,
        )
        return weights(student)

    first = trained(0)
    assert same(first, trained(0))
    assert not same(first, trained(1))


def test_the_users_networks_and_random_numbers_are_left_alone(
    train_loader: DataLoader[Any], val_loader: DataLoader[Any], tmp_path: Path
) -> None:
    """Also where the run fails: no hook, no folder that stands in the way of the next one."""
    student, teacher = small(2), small(3, num_classes=5)
    losses = [AT(pairs={"layer2": "layer2"}, weight=1.0), KD()]
    state = torch.get_rng_state()
    with pytest.raises(UserError, match="classes"):
        fastkd.distill(student, teacher, train_loader, val_loader, epochs=1, losses=losses, **QUIET)
    hooks = [m._forward_hooks for net in (student, teacher) for m in net.modules()]
    assert not any(hooks)
    assert torch.get_rng_state().equal(state)

    class Failing:
        def __iter__(self):
            raise RuntimeError("no first batch")

        def __len__(self):
            return 2

    with pytest.raises(RuntimeError, match="no first batch"):
        fastkd.distill(
            student,
            None,
            Failing(),
            val_loader,
            epochs=1,
            losses=[CrossEntropy()],
            out=tmp_path / "run",
            **QUIET,
        )
    assert not (tmp_path / "run").exists()


def test_labels_of_any_whole_number_type_will_do(val_loader: DataLoader[Any]) -> None:
    batches = [(images, labels.int()) for images, labels, *_ in val_loader]
    result = fastkd.distill(
        small(2), None, batches, batches, epochs=1, losses=[CrossEntropy()], **QUIET
    )
    assert 0 <= result.metrics["accuracy_last"] <= 1


class Plain:
    """A loader that is no DataLoader and has no data set to count."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        return iter(self.loader)


@pytest.mark.parametrize("kind", [Plain, lambda loader: loader], ids=["plain", "DataLoader"])
def test_whether_compiling_pays_does_not_hang_on_the_kind_of_loader(
    train_loader: DataLoader[Any], val_loader: DataLoader[Any], kind: Any, monkeypatch: Any
) -> None:
    batch_size = len(next(iter(val_loader))[0])
    # 120 images, or 8 batches as large as those of validation.
    expected = 8 * 16 if kind is Plain else 120
    assert images_per_epoch(kind(train_loader), batch_size) == expected

    compiled: list[bool] = []

    def noted(unit: Any, *, enabled: bool, **_: Any) -> Any:
        compiled.append(enabled)
        return unit

    monkeypatch.setattr(fastkd.training.engine, "compile_unit", noted)
    # Forward, and twice as much backward; `auto` projects this for the images of all epochs.
    macs = 3 * count(small(2), (3, 8, 8)).macs * expected
    auto: dict[str, Any] = QUIET | {"compile": "auto"}
    pays_s = PAYS_FROM * COMPILE_SECONDS["cpu"]
    for epochs in (1, 3):
        for speed, pays in ((0.999, True), (1.001, False)):
            monkeypatch.setitem(MACS_PER_SECOND, "cpu", speed * macs * epochs / pays_s)
            compiled.clear()
            fastkd.distill(
                small(2),
                None,
                kind(train_loader),
                val_loader,
                epochs=epochs,
                losses=[CrossEntropy()],
                **auto,
            )
            assert compiled
            assert set(compiled) == {pays}
