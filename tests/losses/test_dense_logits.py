"""Losses on dense logits [N, C, H, W]: a row is a pixel, as in `KDLoss`.

The truth is the formula in float64 on the rows [N H W, C], with an upstream gradient that is not 1.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.losses import DIST, DKD, KD, CrossEntropy, Discriminator, KDLoss, MixedCE, SoftCE
from fastkd.losses.base.term import LossTerm
from fastkd.testing import bind_term, call_term

N, C, H, W = 3, 5, 4, 6


def rows(x_NCHW: Tensor) -> Tensor:
    return torch.stack([x_NCHW[n, :, i, j] for n in range(N) for i in range(H) for j in range(W)])


def kl(t_NC: Tensor, s_NC: Tensor) -> Tensor:
    return (t_NC * (t_NC.log() - s_NC.log())).sum(1).mean()


def normal(z_NC: Tensor) -> Tensor:
    return (z_NC - z_NC.mean(1, keepdim=True)) / (z_NC.std(1, keepdim=True) + 1e-7)


def kd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    known = y >= 0
    s, t, y = s[known], t[known], y[known]
    return 0.9 * 4 * kl((t / 2).softmax(1), (s / 2).softmax(1)) + 0.1 * F.cross_entropy(s, y)


def kd_alone(s: Tensor, t: Tensor, _: Tensor) -> Tensor:
    return 0.9 * 4 * kl((t / 2).softmax(1), (s / 2).softmax(1))


def kd_standardized(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    known = y >= 0
    s, t, y = s[known], t[known], y[known]
    divergence = kl((normal(t) / 2).softmax(1), (normal(s) / 2).softmax(1))
    return 0.9 * 4 * divergence + 0.1 * F.cross_entropy(s, y)


def ce(s: Tensor, _: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(s[y >= 0].log_softmax(1), y[y >= 0])


def soft_ce(s: Tensor, t: Tensor, _: Tensor) -> Tensor:
    return -(t.softmax(1) * s.log_softmax(1)).sum(1).mean()


def dkd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    known = y >= 0
    own = F.one_hot(y[known], C).bool()
    binary, others = [], []
    for z in (t[known], s[known]):
        p = (z / 3).softmax(1)
        binary.append(torch.stack([p[own], 1 - p[own]], 1))
        rest = p[~own].view(len(p), -1)
        others.append(rest / rest.sum(1, keepdim=True))
    return 9 * (kl(*binary) + 2 * kl(*others))


def dist(s: Tensor, t: Tensor, _: Tensor) -> Tensor:
    def apart(a: Tensor, b: Tensor) -> Tensor:
        pairs = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]
        return (1 - torch.stack(pairs)).mean()

    s, t = (s / 2).softmax(1), (t / 2).softmax(1)
    return 4 * (apart(s, t) + apart(s.T, t.T))


CASES: dict[str, tuple[Callable[[], LossTerm], Callable[..., Tensor], bool]] = {
    "kd": (lambda: KD(temperature=2), kd, False),
    "kd, void pixels": (lambda: KD(temperature=2), kd, True),
    "kd alone": (lambda: KD(temperature=2, ce_weight=0), kd_alone, True),
    "kd standardized": (lambda: KD(temperature=2, standardize=True), kd_standardized, True),
    "ce, void pixels": (CrossEntropy, ce, True),
    "soft_ce": (SoftCE, soft_ce, False),
    "dkd": (lambda: DKD(beta=2, temperature=3, warmup_epochs=0), dkd, False),
    "dkd, void pixels": (lambda: DKD(beta=2, temperature=3, warmup_epochs=0), dkd, True),
    "dist": (lambda: DIST(weight=1, temperature=2), dist, False),
}


def total(term: LossTerm, tensors: dict[str, Tensor], labels: Tensor) -> Tensor:
    parts = call_term(term, tensors, labels).parts
    return torch.stack([weight * parts[name] for name, weight in term.weights.items()]).sum()


def same_gradient(*each: tuple[Tensor, Tensor]) -> None:
    """Of a loss and of the truth, each with its leaf, for an upstream gradient that is not 1."""
    found, truth = (torch.autograd.grad(-0.37 * loss, leaf)[0] for loss, leaf in each)
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-8)


def dense(*, void: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (2 * torch.randn(N, C, H, W, generator=generator) for _ in range(2))
    labels = torch.randint(0, C, (N, H, W), generator=generator)
    if void:
        labels[0, 1], labels[2, :, 3] = -100, -100
    return student, teacher, labels


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
def test_a_row_is_a_pixel(case: str, layout: torch.memory_format) -> None:
    make, formula, void = CASES[case]
    student, teacher, labels = dense(void=void)
    leaf = student.contiguous(memory_format=layout).requires_grad_()
    teacher = teacher.contiguous(memory_format=layout)
    found = total(make(), {"x/student/logits": leaf, "x/teacher/logits": teacher}, labels)
    wide = student.double().requires_grad_()
    truth = formula(rows(wide), rows(teacher.double()), labels.flatten())
    assert found.item() == pytest.approx(truth.item(), rel=1e-5)
    one, other = (
        torch.autograd.grad(-0.37 * loss, z)[0] for loss, z in ((found, leaf), (truth, wide))
    )
    torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-8)
    if case.startswith("kd") and "standardized" not in case:
        weights = {"ce_weight": 0.1, "kd_weight": 0.9} if case != "kd alone" else {"ce_weight": 0}
        drop_in = KDLoss(temperature=2, **weights)
        given = (student, teacher) if case == "kd alone" else (student, teacher, labels)
        assert drop_in(*given).item() == pytest.approx(truth.item(), rel=1e-5)


def test_mixed_labels_are_those_of_the_pixel() -> None:
    student, other, _ = dense()
    mixed = other.softmax(1)
    leaf = student.clone().requires_grad_()
    tensors = {"xprime/student/logits": leaf, "xprime/mixed/labels": mixed}
    found = call_term(MixedCE(), tensors).parts["mixed_ce"]
    wide = student.double().requires_grad_()
    truth = -(rows(mixed.double()) * rows(wide).log_softmax(1)).sum(1).mean()
    assert found.item() == pytest.approx(truth.item(), rel=1e-5)
    one, other = (
        torch.autograd.grad(-0.37 * loss, z)[0] for loss, z in ((found, leaf), (truth, wide))
    )
    torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-8)


def test_the_discriminator_judges_pixels() -> None:
    student, teacher, _ = dense()
    leaf = student.clone().requires_grad_()
    tensors = {"x/student/logits": leaf, "x/teacher/mean_logits": teacher}
    term = bind_term(Discriminator(), tensors, num_classes=C)
    found = call_term(term, tensors).parts["discriminator"]
    wide, layers = student.double().requires_grad_(), term.layers.double()
    guesses = layers(torch.cat([rows(wide), rows(teacher.double())]))
    truth_M2 = torch.tensor([[1.0, 0.0]] * (N * H * W) + [[0.0, 1.0]] * (N * H * W)).double()
    truth = F.binary_cross_entropy_with_logits(guesses, truth_M2)
    assert found.item() == pytest.approx(truth.item(), rel=1e-5)
    one, other = (
        torch.autograd.grad(-0.37 * loss, z)[0] for loss, z in ((found, leaf), (truth, wide))
    )
    torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-8)
