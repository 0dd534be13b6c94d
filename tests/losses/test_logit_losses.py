"""Losses on logits against their formulas in float64: gradients, hard inputs, identities, messages.

A loss in fp32 or on bf16 logits may be at most twice as wrong as the formula below in fp32.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.errors import UserError
from fastkd.losses import DIST, DKD, KD, CrossEntropy, Discriminator, KDLoss, SoftCE
from fastkd.losses.base.schedules import cosine_decay, linear_warmup
from fastkd.losses.base.term import LossTerm
from fastkd.losses.dkd import decoupled_rows
from fastkd.losses.logits import standardize
from fastkd.testing import assert_as_accurate, bind_term, call_term, kd_case, luck, shape_id

SHAPES = [(33, 101), (7, 3), (2, 1000)]


def kl(teacher_NC: Tensor, student_NC: Tensor) -> Tensor:
    return (teacher_NC * (teacher_NC.log() - student_NC.log())).sum(1).mean()


def dkd(student_NC: Tensor, teacher_NC: Tensor, labels_N: Tensor) -> Tensor:
    own_NC = F.one_hot(labels_N, student_NC.shape[1]).bool()
    pairs, others = [], []
    for z_NC in (teacher_NC, student_NC):
        p_NC = (z_NC / 3).softmax(1)
        p_y = p_NC[own_NC]
        pairs.append(torch.stack([p_y, 1 - p_y], 1))
        rest_NM = p_NC[~own_NC].view(len(p_NC), -1)
        others.append(rest_NM / rest_NM.sum(1, keepdim=True))
    return 9 * (1.5 * kl(*pairs) + 6 * kl(*others))


def dist(student_NC: Tensor, teacher_NC: Tensor, labels_N: Tensor) -> Tensor:
    s_NC, t_NC = (student_NC / 2).softmax(1), (teacher_NC / 2).softmax(1)

    def distance(s_NC: Tensor, t_NC: Tensor) -> Tensor:
        s_NC, t_NC = s_NC - s_NC.mean(1, keepdim=True), t_NC - t_NC.mean(1, keepdim=True)
        return (1 - (s_NC * t_NC).sum(1) / (s_NC.norm(dim=1) * t_NC.norm(dim=1) + 1e-8)).mean()

    return 4 * (distance(s_NC, t_NC) + distance(s_NC.T, t_NC.T))


def kd_standardized(student_NC: Tensor, teacher_NC: Tensor, labels_N: Tensor) -> Tensor:
    num = student_NC.shape[1]
    probabilities = []
    for z_NC in (teacher_NC, student_NC):
        mean_N1 = z_NC.sum(1, keepdim=True) / num
        variance_N1 = (z_NC - mean_N1).pow(2).sum(1, keepdim=True) / (num - 1)
        probabilities.append(((z_NC - mean_N1) / (variance_N1.sqrt() + 1e-7) / 2).softmax(1))
    return 0.1 * F.cross_entropy(student_NC, labels_N) + 36 * kl(*probabilities)


def soft_ce(student_NC: Tensor, teacher_NC: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(student_NC, teacher_NC.softmax(1))


FORMULAS: dict[str, tuple[Callable[[], LossTerm], Callable[..., Tensor]]] = {
    "dkd": (lambda: DKD(alpha=1.5, beta=6, temperature=3, warmup_epochs=0), dkd),
    "dist": (lambda: DIST(weight=1, temperature=2), dist),
    "kd_standardized": (
        lambda: KD(weight=9, ce_weight=0.1, temperature=2, standardize=True),
        kd_standardized,
    ),
    "soft_ce": (lambda: SoftCE(), soft_ce),
}


def inputs(student_NC: Tensor, teacher_NC: Tensor) -> dict[str, Tensor]:
    teacher = dict.fromkeys(("x/teacher/logits", "x/teacher/mean_logits"), teacher_NC)
    return {"x/student/logits": student_NC, **teacher}


def total(term: LossTerm, tensors: dict[str, Tensor], labels_N: Tensor) -> Tensor:
    parts = call_term(term, tensors, labels_N).parts
    return torch.stack([weight * parts[name] for name, weight in term.weights.items()]).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("name", FORMULAS)
def test_loss_and_gradient_are_those_of_the_formula(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    make, formula = FORMULAS[name]
    student_NC, (teacher_NC,), labels_N = kd_case(shape, dtype, 1)
    found = {}
    for kind, wide in {"got": dtype, "eager": torch.float32, "truth": torch.float64}.items():
        leaf_NC = student_NC.to(wide).requires_grad_()
        if kind == "got":
            loss = total(make(), inputs(leaf_NC, teacher_NC), labels_N)
        else:
            loss = formula(leaf_NC, teacher_NC.to(wide), labels_N)
        (gradient_NC,) = torch.autograd.grad(-0.37 * loss, leaf_NC)
        found[kind] = loss.detach(), gradient_NC
    for place, what in enumerate(("loss", "gradient")):
        got, eager, truth = (found[kind][place] for kind in ("got", "eager", "truth"))
        floor = luck(truth)
        if what == "gradient":  # the student's type is what is left of it
            eager = eager.to(dtype)
            floor = torch.finfo(torch.float32).eps * truth.abs().max().item()
        assert_as_accurate(f"{name} {what}", got, eager, truth, floor=floor)


@pytest.mark.parametrize("name", ["dkd", "dist", "kd_standardized"])
def test_equal_logits_leave_nothing_to_learn(name: str) -> None:
    student_NC, _, labels_N = kd_case((9, 17), torch.float32, 2)
    term = KD(ce_weight=0, standardize=True) if name == "kd_standardized" else FORMULAS[name][0]()
    leaf_NC = student_NC.clone().requires_grad_()
    loss = total(term, inputs(leaf_NC, student_NC), labels_N)
    (gradient_NC,) = torch.autograd.grad(loss, leaf_NC)
    assert loss.abs() < 1e-5
    assert gradient_NC.abs().max() < 1e-5


def test_dkd_where_probabilities_underflow() -> None:
    # In fp32 p of the label is 0 in the first row and 1 - p is 0 in the second.
    student_NC = torch.tensor([[-300.0, 0.0, 1.0], [300.0, 0.0, 1.0]], requires_grad=True)
    teacher_NC = torch.tensor([[5.0, 1.0, 0.0], [-5.0, 1.0, 0.0]])
    labels_N = torch.tensor([0, 0])
    tckd_N, nckd_N = decoupled_rows(student_NC, teacher_NC, labels_N, 1.0)
    leaf_NC = student_NC.detach().double().requires_grad_()
    truth = dkd_rows_at_1(leaf_NC, teacher_NC.double())
    torch.testing.assert_close(tckd_N.double(), truth, rtol=1e-6, atol=0)
    assert torch.isfinite(nckd_N).all()
    got = torch.autograd.grad(tckd_N.sum(), student_NC)[0]
    torch.testing.assert_close(got.double(), torch.autograd.grad(truth.sum(), leaf_NC)[0])


def dkd_rows_at_1(student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
    """TCKD for label 0; log p and log(1 - p) of 300 nats fit into float64 this way only."""

    def logs(z_NC: Tensor) -> tuple[Tensor, Tensor]:
        everything_N = z_NC.logsumexp(1)
        return z_NC[:, 0] - everything_N, z_NC[:, 1:].logsumexp(1) - everything_N

    (t, not_t), (s, not_s) = logs(teacher_NC), logs(student_NC)
    return t.exp() * (t - s) + not_t.exp() * (not_t - not_s)


def test_dist_with_a_class_that_nobody_gives_a_chance() -> None:
    student_NC = torch.randn(6, 5)
    student_NC[:, 2] = -1e4  # probability exactly 0 in every row
    student_NC.requires_grad_()
    loss = total(DIST(temperature=1), inputs(student_NC, torch.randn(6, 5)), torch.arange(6))
    (gradient_NC,) = torch.autograd.grad(loss, student_NC)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient_NC).all()
    assert (gradient_NC[:, 2] == 0).all()


@pytest.mark.parametrize("standardized", [False, True])
def test_a_kd_that_reads_no_labels_counts_rows_without_one(standardized: bool) -> None:
    """As `KDLoss` does without labels; -100 switches off what reads labels."""
    student_NC, (teacher_NC,), labels_N = kd_case((7, 5), torch.float32, 1)
    term = KD(ce_weight=0, temperature=2, standardize=standardized)
    leaf_NC = student_NC.clone().requires_grad_()
    s_NC, t_NC = leaf_NC.double(), teacher_NC.double()
    if standardized:
        s_NC, t_NC = standardize(s_NC), standardize(t_NC)
    truth = 0.9 * 4 * kl((t_NC / 2).softmax(1), (s_NC / 2).softmax(1))
    (expected_NC,) = torch.autograd.grad(-0.37 * truth, leaf_NC)
    for hidden in ([1, 4, 6], list(range(7))):
        labels_N[hidden] = -100
        found = total(term, inputs(leaf_NC, teacher_NC), labels_N)
        assert found.item() == pytest.approx(truth.item(), rel=1e-5)
        (gradient_NC,) = torch.autograd.grad(-0.37 * found, leaf_NC)
        torch.testing.assert_close(gradient_NC, expected_NC, rtol=1e-5, atol=1e-7)
    if not standardized:
        drop_in = KDLoss(temperature=2, ce_weight=0, kd_weight=0.9)
        assert drop_in(student_NC, teacher_NC).item() == pytest.approx(truth.item(), rel=1e-5)


@pytest.mark.parametrize("standardized", [False, True])
def test_rows_without_a_label_count_neither_in_a_sum_nor_in_the_divisor(standardized: bool) -> None:
    ce_weight = 0.1
    student_NC, (teacher_NC,), labels_N = kd_case((7, 5), torch.float32, 1)
    labels_N[[1, 4, 6]] = -100
    kept = labels_N >= 0
    term = KD(ce_weight=ce_weight, temperature=2, standardize=standardized)

    def truth(leaf_NC: Tensor) -> Tensor:
        few = leaf_NC[kept].double(), teacher_NC[kept].double()
        ce = F.nll_loss(few[0].log_softmax(1), labels_N[kept])
        s_NC, t_NC = map(standardize, few) if standardized else few
        return ce_weight * ce + 0.9 * 4 * kl((t_NC / 2).softmax(1), (s_NC / 2).softmax(1))

    leaf_NC = student_NC.clone().requires_grad_()
    found, expected = total(term, inputs(leaf_NC, teacher_NC), labels_N), truth(leaf_NC)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(-0.37 * loss, leaf_NC)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    assert not gradients[0][~kept].any()
    if not standardized:
        drop_in = KDLoss(temperature=2, ce_weight=ce_weight, kd_weight=0.9)
        assert drop_in(student_NC, teacher_NC, labels_N).item() == pytest.approx(found.item())

    nobody = total(term, inputs(leaf_NC, teacher_NC), torch.full_like(labels_N, -100))
    assert nobody.item() == 0
    assert not torch.autograd.grad(nobody, leaf_NC)[0].any()


def test_cross_entropy_is_the_mean_of_the_labelled_rows() -> None:
    logits_NC, _, labels_N = kd_case((6, 4), torch.float32, 1)
    labels_N[[0, 5]] = -100
    tensors = {"x/student/logits": logits_NC}
    few_NC = logits_NC[1:5].double().log_softmax(1)
    smoothed = -0.8 * few_NC.gather(1, labels_N[1:5, None]).mean() - 0.2 * few_NC.mean()
    found = total(CrossEntropy(label_smoothing=0.2), tensors, labels_N)
    assert found.item() == pytest.approx(smoothed.item(), rel=1e-6)
    assert total(CrossEntropy(), tensors, torch.full_like(labels_N, -100)).item() == 0


def test_standardized_logits_have_no_size_and_no_offset() -> None:
    z_NC = torch.randn(5, 11, dtype=torch.float64)
    found_NC = standardize(z_NC)
    torch.testing.assert_close(found_NC.mean(1), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(found_NC.var(1), torch.ones(5).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(standardize(7 * z_NC - 3), found_NC, rtol=1e-6, atol=1e-6)
    flat_NC = torch.full((2, 4), 3.0, requires_grad=True)
    assert standardize(flat_NC).tolist() == [[0.0] * 4] * 2
    (gradient_NC,) = torch.autograd.grad(standardize(flat_NC).square().sum(), flat_NC)
    assert torch.isfinite(gradient_NC).all()


def test_dkd_refuses_two_classes() -> None:
    tensors = inputs(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(UserError, match=r"losses\.dkd is undefined for 2 classes.*losses\.kd"):
        bind_term(DKD(), tensors, num_classes=2)


def test_warm_up_counts_its_first_epoch() -> None:
    warmup = linear_warmup(20)
    assert [warmup(e) for e in (0, 0.99, 1, 18, 19, 20, 100)] == pytest.approx(
        [0.05, 0.05, 0.1, 0.95, 1, 1, 1]
    )
    assert linear_warmup(0)(0) == 1
    assert DKD().schedules()["warmup"](4) == 0.25


def test_cosine_of_no_epochs_is_its_end() -> None:
    assert cosine_decay(0, 0.5)(0) == 0.5
    assert cosine_decay(60, 1.0)(17) == 1


@pytest.mark.parametrize(
    ("classes", "widths"),
    [(1000, [1000, 125, 15, 2]), (100, [100, 16, 8, 2]), (10, [10, 16, 8, 2])],
)
def test_widths_of_the_discriminator(classes: int, widths: list[int]) -> None:
    tensors = inputs(torch.zeros(2, classes), torch.zeros(2, classes))
    term = bind_term(Discriminator(), tensors, num_classes=classes)
    linears = [m for m in term.modules() if isinstance(m, torch.nn.Linear)]
    assert [linears[0].in_features, *(m.out_features for m in linears)] == widths
    if classes == 1000:
        assert sum(p.numel() for p in term.parameters()) == 127_047


def test_what_the_student_does_with_the_discriminators_gradient() -> None:
    student_NC, (teacher_NC,), _ = kd_case((8, 10), torch.float32, 3)
    found = {}
    for mode in ("cooperative", "reversed", "detached"):
        torch.manual_seed(1)
        leaf_NC = student_NC.clone().requires_grad_()
        tensors = inputs(leaf_NC, teacher_NC)
        term = bind_term(Discriminator(mode=mode), tensors)
        loss = call_term(term, tensors).parts["discriminator"]
        loss.backward()
        own = torch.cat([p.grad.flatten() for p in term.parameters() if p.grad is not None])
        found[mode] = loss.item(), own, leaf_NC.grad
    loss, own, gradient_NC = found["cooperative"]
    assert gradient_NC is not None
    assert gradient_NC.abs().sum() > 0
    assert all(value == loss for value, _, _ in found.values())
    assert all(torch.equal(other, own) for _, other, _ in found.values())
    assert torch.equal(found["reversed"][2], -gradient_NC)
    assert found["detached"][2] is None


def test_rates_of_the_discriminator() -> None:
    tensors = inputs(torch.zeros(2, 10), torch.zeros(2, 10))
    scales = {}
    for rule in ("released", "paper"):
        (group,) = bind_term(Discriminator(lr_rule=rule), tensors).param_groups()
        assert group["weight_decay"] == 0
        assert len(group["params"]) == 6
        scales[rule] = group["lr_scale"]
    # Its flag is 1e-4 beside 0.01 of the student; released, the student's rate overwrites it.
    assert scales == {"released": 1.0, "paper": 1e-4 / 0.01}
