"""Hard-label CutMix in both readings: values and gradients against the papers' own spelling.

The formulas below take lambda and the partners; the terms get `ViewMaker.xprime_targets` of them.
"""

import pytest
import torch
from torch import Tensor

from fastkd.augment.mix import draw_mix
from fastkd.augment.views import ViewMaker
from fastkd.compute.placement import Placement
from fastkd.compute.precision import Precision
from fastkd.compute.ranks import World
from fastkd.data.batch import Batch
from fastkd.losses import KD, MixedCE
from fastkd.losses.base.needs import Need
from fastkd.testing import call_term, sines

SHAPE = (7, 11)
LABELS_N = (3 * torch.arange(7) + 1) % 11


def drawn(kind: str) -> tuple[dict[str, Tensor], Tensor, float]:
    """Teacher's and mixed tensors of one step, its partners, and lambda counted in pixels."""
    draw = draw_mix(kind, seed=0, epoch=0, step=9, num=7, side=32)
    teacher = {"x/teacher/logits": sines(SHAPE, 2, 4).float()}
    make = ViewMaker(
        kind,
        seed=0,
        placement=Placement(World(0, 0, 1, torch.device("cpu"), None), Precision("fp32", "cpu")),
        layout=torch.channels_last,
        mixes=("labels", "logits"),
        num_classes=11,
    )
    batch = Batch(torch.zeros(7, 3, 32, 32), LABELS_N, torch.arange(7))
    lam = draw.lam
    if draw.box is not None:
        top, bottom, left, right = draw.box
        replaced = torch.zeros(32, 32)
        replaced[top:bottom, left:right] = 1
        lam = 1 - replaced.mean().item()
        # The clipped box is not the one that lambda was drawn for.
        assert lam != pytest.approx(draw.lam, abs=1e-3)
    assert 0.05 < lam < 0.95
    return (
        teacher | make.xprime_targets(batch, teacher, 0, 9),
        torch.from_numpy(draw.partner_N),
        lam,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_labels_of_both_images(kind: str, dtype: torch.dtype) -> None:
    tensors, partner_N, lam = drawn(kind)
    student_NC = sines(SHAPE, 34, 3).to(dtype).requires_grad_()
    tensors["xprime/student/logits"] = student_NC
    found = call_term(MixedCE(weight=0.9), tensors, LABELS_N).parts["mixed_ce"]
    (gradient,) = torch.autograd.grad(3.5 * found, student_NC)

    truth_NC = student_NC.detach().double().requires_grad_()
    log_p_NC = truth_NC - truth_NC.exp().sum(1, keepdim=True).log()
    rows_N = torch.arange(7)
    own, others = log_p_NC[rows_N, LABELS_N], log_p_NC[rows_N, LABELS_N[partner_N]]
    expected = -(lam * own + (1 - lam) * others).mean()
    (wanted,) = torch.autograd.grad(3.5 * expected, truth_NC)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    error = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(gradient.double(), wanted, rtol=error, atol=error * 1e-2)


@pytest.mark.parametrize("views", [("x", "xprime"), ("xprime",)])
@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_logits_of_both_images(kind: str, views: tuple[str, ...]) -> None:
    tensors, partner_N, lam = drawn(kind)
    for view, number in (("x", 1), ("xprime", 34)):
        tensors[f"{view}/student/logits"] = sines(SHAPE, number, 3).float().requires_grad_()
    term = KD(views=views, xprime_target="mixed_logits", temperature=4)
    assert set(term.needs) <= tensors.keys()
    # The teacher is asked about x, of whose answers the targets are mixed, and not about x'.
    assert "x/teacher/logits" in term.needs
    assert not any((need.view, need.net) == ("xprime", "teacher") for need in term.needs)
    parts = call_term(term, tensors, LABELS_N).parts
    student_NC = tensors["xprime/student/logits"]
    (gradient,) = torch.autograd.grad(-2 * parts["kd_xprime"], student_NC)

    t_NC = tensors["x/teacher/logits"].double()
    q_NC = ((lam * t_NC + (1 - lam) * t_NC[partner_N]) / 4).softmax(1)
    truth_NC = student_NC.detach().double().requires_grad_()
    p_NC = (truth_NC / 4).softmax(1)
    expected = 16 * (q_NC * (q_NC / p_NC).log()).sum(1).mean()
    (wanted,) = torch.autograd.grad(-2 * expected, truth_NC)
    assert parts["kd_xprime"].item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)
    assert ("kd" in parts) == ("x" in views)


def test_what_is_mixed_is_named() -> None:
    with pytest.raises(ValueError, match=r"xprime/mixed/labels or xprime/mixed/logits; got"):
        Need("x/mixed/labels")
    with pytest.raises(ValueError, match=r"got 'xprime/mixed/stage1'"):
        Need("xprime/mixed/stage1")
