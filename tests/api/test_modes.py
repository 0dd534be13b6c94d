"""Networks whose `train()` returns nothing, and callers in another grad mode: the same training."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd.errors import UserError
from fastkd.losses import KD, CrossEntropy
from fastkd.training.result import Result

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4


class Net(nn.Module):
    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.conv(images_NCHW))).mean((2, 3)))


class Frozen(Net):
    """With a batch norm that stays in evaluation, as detectors have it."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self.norm.eval()


class NoEval(Net):
    def eval(self) -> None:  # type: ignore[override]
        super().eval()


class NoTo(Net):
    def to(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        super().to(*args, **kwargs)


def made(kind: type[Net], seed: int) -> Net:
    torch.manual_seed(seed)
    return kind()


def distill(student: nn.Module, teacher: nn.Module | None, **options: Any) -> Result:
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)
    given = {"epochs": 1, "device": "cpu", "precision": "fp32", "quiet": True} | options
    return fastkd.distill(student, teacher, loader, loader, **given)


def first_loss(student: Net, teacher: Net) -> float:
    return distill(student, teacher).history[0]["train_loss"]


def expected(student: Net, teacher: Net, *, still: bool = False) -> float:
    """KD at its defaults, by hand."""
    nn.Module.train(student)
    student.norm.train(not still)
    nn.Module.train(teacher, False)
    with torch.no_grad():
        given_NC, taught_NC = student(IMAGES), teacher(IMAGES)
    log_p, q = F.log_softmax(given_NC / 4, 1), F.softmax(taught_NC / 4, 1)
    kl = F.kl_div(log_p, q, reduction="batchmean") * 16
    return (0.9 * kl + 0.1 * F.cross_entropy(given_NC, LABELS)).item()


@pytest.mark.parametrize("kind", [Frozen, NoEval, NoTo])
def test_what_an_override_returns_is_not_used(kind: type[Net]) -> None:
    truth = expected(made(Net, 0), made(Net, 1))
    assert first_loss(made(Net, 0), made(kind, 1)) == pytest.approx(truth, rel=1e-5)
    student = made(kind, 0)
    truth = expected(made(Net, 0), made(Net, 1), still=kind is Frozen)
    result = distill(student, made(Net, 1))
    assert result.history[0]["train_loss"] == pytest.approx(truth, rel=1e-5)
    assert result.student is student
    assert isinstance(result.best, kind)
    assert not result.best.training
    fused = fastkd.fuse(made(kind, 1))
    torch.testing.assert_close(fused(IMAGES), nn.Module.train(made(Net, 1), False)(IMAGES))


@pytest.mark.parametrize("mode", [torch.no_grad, lambda: torch.set_grad_enabled(False)])
def test_the_caller_may_have_switched_gradients_off(mode: Any) -> None:
    truth = expected(made(Net, 0), made(Net, 1))
    student = made(Net, 0)
    with torch.enable_grad(), mode():
        assert first_loss(student, made(Net, 1)) == pytest.approx(truth, rel=1e-5)
        assert not torch.is_grad_enabled()
    assert not torch.equal(student.conv.weight, made(Net, 0).conv.weight)


def test_inference_mode_is_refused_at_once() -> None:
    with (
        torch.inference_mode(),
        pytest.raises(UserError, match=r"inference_mode\(\): call fastkd outside"),
    ):
        distill(Net(), Net())


def test_networks_made_in_inference_mode() -> None:
    with torch.inference_mode():
        student, teacher = made(Net, 0), made(Net, 1)
    with pytest.raises(UserError, match=r"the student Net was built or loaded under .* it outside"):
        distill(student, None, losses=[CrossEntropy()])
    truth = expected(made(Net, 0), made(Net, 1))
    assert first_loss(made(Net, 0), teacher) == pytest.approx(truth, rel=1e-5)


class Auxiliary(Net):
    """With a head that only training has, and that wants images of at least 100 pixels."""

    def forward(self, images_NCHW: Tensor) -> Tensor:
        assert images_NCHW.shape[-1] >= (100 if self.training else 40), "too small"
        return super().forward(images_NCHW)


@pytest.mark.parametrize("losses", [[CrossEntropy()], [KD()]])
def test_an_advised_size_works_in_training_too(losses: Any) -> None:
    teacher = Net() if isinstance(losses[0], KD) else None
    with pytest.raises(UserError, match=r"8x8 pixels \(too small\), but those of 128x128"):
        distill(made(Auxiliary, 0), teacher, losses=losses)


@pytest.mark.parametrize(("accumulate", "end"), [(1, "larger batch_size$"), (2, "accumulate$")])
def test_a_smaller_accumulate_is_advised_only_where_it_can_be(accumulate: int, end: str) -> None:
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Sequential(self.fc, nn.BatchNorm1d(4))  # type: ignore[assignment]

    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=accumulate)
    with pytest.raises(UserError, match=end):
        fastkd.distill(
            Normed(),
            None,
            loader,
            loader,
            epochs=1,
            losses=[CrossEntropy()],
            accumulate=accumulate,
            device="cpu",
            quiet=True,
        )
