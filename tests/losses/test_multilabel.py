"""Binary cross entropy of several labels against its formula in numpy, in float64."""

import numpy as np
import pytest
import torch

from fastkd.errors import UserError
from fastkd.losses import CRD, DKD, KD, BinaryCrossEntropy, CrossEntropy, JointRD, TermInputs
from fastkd.losses.base.registry import typed_config
from fastkd.losses.base.term import BindContext


def truth(logits_NC, targets_NC):
    """Loss and gradient, element by element."""
    z, y = logits_NC.double().numpy(), targets_NC.double().numpy()
    known = y != -1
    p = 1 / (1 + np.exp(-z))
    loss = -(y * np.log(p) + (1 - y) * np.log1p(-p))
    count = max(known.sum(), 1)
    return np.where(known, loss, 0).sum() / count, np.where(known, p - y, 0) / count


def term_loss(logits_NC, targets_NC):
    index_N = torch.arange(len(logits_NC))
    inputs = TermInputs({"x/student/logits": logits_NC}, targets_NC, index_N, {})
    return BinaryCrossEntropy()(inputs).parts["bce"]


@pytest.mark.parametrize(("num", "classes"), [(1, 1), (5, 3), (17, 20)])
@pytest.mark.parametrize("unknown", [0.0, 0.3])
def test_values_and_gradient(num, classes, unknown):
    logits_NC = (3 * torch.randn(num, classes)).requires_grad_()
    targets_NC = (torch.rand(num, classes) < 0.3).float()
    targets_NC[torch.rand(num, classes) < unknown] = -1
    loss = term_loss(logits_NC, targets_NC)
    (0.7 * loss).backward()
    wanted, gradient = truth(logits_NC.detach(), targets_NC)
    np.testing.assert_allclose(loss.item(), wanted, rtol=2e-6, atol=1e-8)
    np.testing.assert_allclose(logits_NC.grad.numpy(), 0.7 * gradient, rtol=2e-5, atol=1e-8)


def test_targets_between_0_and_1_and_wild_logits():
    logits_NC = torch.tensor([[80.0, -80.0, 2.0]], requires_grad=True)
    targets_NC = torch.tensor([[0.0, 1.0, 0.25]])
    loss = term_loss(logits_NC, targets_NC)
    loss.backward()
    # log(1 + exp(-80)) is 0 beside 80.
    last = -(0.25 * np.log(1 / (1 + np.exp(-2))) + 0.75 * np.log(1 / (1 + np.exp(2))))
    assert loss.item() == pytest.approx((80 + 80 + last) / 3)
    np.testing.assert_allclose(
        logits_NC.grad, [[1 / 3, -1 / 3, (1 / (1 + np.exp(-2)) - 0.25) / 3]], rtol=1e-6
    )


def test_unknown_labels_teach_nothing_even_where_logits_overflow():
    logits_NC = torch.tensor([[float("inf"), 1.0]], requires_grad=True)
    loss = term_loss(logits_NC, torch.tensor([[-1.0, 1.0]]))
    assert loss.item() == pytest.approx(np.log1p(np.exp(-1)))
    logits_NC = torch.randn(3, 2, requires_grad=True)
    loss = term_loss(logits_NC, torch.full((3, 2), -1.0))
    loss.backward()
    assert loss.item() == 0 and not logits_NC.grad.any()


def test_half_precision_logits_are_summed_in_fp32():
    logits_NC = torch.randn(64, 20).bfloat16()
    targets_NC = (torch.rand(64, 20) < 0.1).float()
    loss = term_loss(logits_NC, targets_NC)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(truth(logits_NC.float(), targets_NC)[0], rel=1e-6)


def test_each_term_says_which_labels_it_reads():
    assert BinaryCrossEntropy().label_kind == "multi"
    assert {CrossEntropy().label_kind, KD().label_kind, DKD().label_kind} == {"class"}
    assert CRD().label_kind == JointRD().label_kind == "class"
    assert KD(ce_weight=0).label_kind is None
    assert typed_config("bce", {"weight": 2.0}).build("bce").weights == {"bce": 2.0}
    with pytest.raises(ValueError, match=r"losses\.bce\.wieght"):
        typed_config("bce", {"wieght": 2.0})


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_one_class_per_image_is_a_target_of_every_class(smoothing, threshold):
    """Against the formula in float64; ids are one-hot rows, -100 counts nowhere."""
    logits_NC = (2 * torch.randn(6, 5)).requires_grad_()
    labels_N = torch.tensor([0, 4, -100, 2, 2, 1])
    rows_NC = torch.nn.functional.one_hot(labels_N.clamp(min=0), 5).float()
    mixed_NC = 0.7 * rows_NC + 0.3 * rows_NC.roll(1, 0)
    for given, targets_NC in ((labels_N, rows_NC), (mixed_NC, mixed_NC)):
        targets_NC = targets_NC.double()
        if threshold is not None:
            targets_NC = (targets_NC > threshold).double()
        targets_NC = (1 - smoothing) * targets_NC + smoothing / 5
        if given is labels_N:
            targets_NC[2] = -1
        inputs = TermInputs({"x/student/logits": logits_NC}, given, torch.arange(6), {})
        term = BinaryCrossEntropy(label_smoothing=smoothing, target_threshold=threshold)
        loss = term(inputs).parts["bce"]
        (gradient,) = torch.autograd.grad(0.7 * loss, logits_NC)
        wanted, wanted_gradient = truth(logits_NC.detach(), targets_NC)
        np.testing.assert_allclose(loss.item(), wanted, rtol=1e-5)
        np.testing.assert_allclose(gradient.numpy(), 0.7 * wanted_gradient, rtol=2e-5, atol=1e-7)


def test_timms_binary_cross_entropy_is_the_same():
    timm = pytest.importorskip("timm.loss")
    logits_NC, mixed_NC = torch.randn(8, 7), torch.rand(8, 7).softmax(1)
    for threshold in (None, 0.15):
        theirs = timm.BinaryCrossEntropy(smoothing=0.0, target_threshold=threshold)
        inputs = TermInputs({"x/student/logits": logits_NC}, mixed_NC, torch.arange(8), {})
        ours = BinaryCrossEntropy(target_threshold=threshold)(inputs).parts["bce"]
        torch.testing.assert_close(ours, theirs(logits_NC, mixed_NC))


def test_several_labels_are_not_blurred():
    labels_NC = torch.zeros(4, 3)
    context = BindContext(4, 3, labels_NC, {})
    BinaryCrossEntropy().bind(context)
    for keys in ({"label_smoothing": 0.1}, {"target_threshold": 0.2}):
        with pytest.raises(UserError, match="which are for images of one class"):
            BinaryCrossEntropy(**keys).bind(context)
