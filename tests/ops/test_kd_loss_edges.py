"""`kd_loss` at the edges of its contract: layouts, empty batches, NaN, infinities, wrong input."""

import math

import pytest
import torch
from torch import Tensor

from fastkd.kernels import kd_loss, kd_loss_mean
from fastkd.testing import assert_as_accurate, eager_kd_rows, kd_case, rms, shape_id

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_second_backward_and_inputs_left_alone(impl: str, scale: float, dtype) -> None:
    student, others, labels = kd_case((9, 40), dtype, 0)
    student.requires_grad_()
    before = [x.clone() for x in (student.detach(), *others)]
    loss = scale * kd_loss_mean(student, others, labels, impl=impl)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(second, kept, rtol=2e-2 if dtype.itemsize == 2 else 1e-6, atol=0)
    student.grad = None
    loss = kd_loss_mean(student, others, labels, impl=impl)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(student.grad, 3 * once, rtol=2e-2, atol=0)
    for now, then in zip((student.detach(), *others), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(64, 10), (33, 1000), (2, 19, 64, 64)], ids=shape_id)
@pytest.mark.usefixtures("needs_cpp")
def test_repeats_bit_by_bit_on_any_number_of_threads(shape, threads: int) -> None:
    student, others, labels = kd_case(shape, torch.float32, 0)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (2, threads, threads):
            torch.set_num_threads(count)
            leaf = student.clone().requires_grad_()
            loss = kd_loss_mean(leaf, others, labels, class_dim=1, impl="cpp")
            results.append((loss.item(), torch.autograd.grad(loss, leaf)[0]))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert loss == results[0][0]
        assert torch.equal(grad, results[0][1])


def test_strides_do_not_matter(impl: str) -> None:
    student, (teacher,), labels = kd_case((12, 40), torch.float32, 0)
    padded = torch.full((12, 80), math.nan)
    padded[:, :40] = student
    results = []
    for s, t in (
        (student, teacher),
        (student.t().contiguous().t(), teacher),
        (padded[:, :40], teacher),
        (student, teacher.t().contiguous().t()),
        (student, teacher.repeat_interleave(2, 0)[::2]),
    ):
        leaf = s.detach().requires_grad_()
        got = kd_loss(leaf, t, labels, impl=impl)
        (grad,) = torch.autograd.grad((got.kd + got.ce).sum(), leaf)
        results.append([*(x.detach() for x in got), grad])
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("classes", [19, 40])
def test_channels_last_and_mixed_layouts(impl: str, interpreted: bool, classes: int) -> None:
    student, (teacher,), labels = kd_case((2, classes, 6, 5), torch.float32, 0)

    def plain(wide: torch.dtype) -> list[Tensor]:
        leaf = student.to(wide).requires_grad_()
        kd, ce = eager_kd_rows(leaf, [teacher.to(wide)], labels, 4.0)
        (grad,) = torch.autograd.grad((0.9 * kd + 0.1 * ce).mean(), leaf)
        return [kd.detach(), ce.detach(), grad]

    eager, truth = plain(torch.float32), plain(torch.float64)
    agree = (student.argmax(1) == teacher.argmax(1)).float()
    for s_format in (torch.contiguous_format, torch.channels_last):
        for t_format in (torch.contiguous_format, torch.channels_last):
            s = student.clone(memory_format=s_format).requires_grad_()
            t = teacher.clone(memory_format=t_format)
            kd, ce, same = kd_loss(s, t, labels, class_dim=1, impl=impl)
            assert torch.equal(same, agree)
            (grad,) = torch.autograd.grad(kd_loss_mean(s, t, labels, class_dim=1, impl=impl), s)
            assert impl == "reference" or grad.stride() == s.stride()
            for name, *values in zip(
                ("kd", "ce", "grad"), (kd.detach(), ce.detach(), grad), eager, truth, strict=True
            ):
                floor = torch.finfo(torch.float32).eps * rms(values[2])
                factor = 4.0 if interpreted else 2.0
                assert_as_accurate(name, *values, factor=factor, floor=floor)


@pytest.mark.parametrize(
    "shape", [(0, 10), (0, 100), (1, 10), (1, 1000), (0, 5, 2, 2)], ids=shape_id
)
def test_empty_and_single_batches(impl: str, shape) -> None:
    student, others, labels = kd_case(shape, torch.float32, 0)
    student.requires_grad_()
    loss = kd_loss_mean(student, others, labels, class_dim=1, impl=impl)
    loss.backward()
    assert math.isfinite(loss.item())
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert (loss.item() == 0) == (shape[0] == 0)


def test_all_rows_ignored_give_zero(impl: str) -> None:
    student, others, labels = kd_case((6, 40), torch.float32, 0)
    student.requires_grad_()
    loss = kd_loss_mean(student, others, torch.full_like(labels, -100), impl=impl)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


@pytest.mark.parametrize("shape", [(6, 10), (6, 40)], ids=shape_id)
def test_nan_reaches_its_own_row_only(impl: str, shape) -> None:
    student, (teacher,), labels = kd_case(shape, torch.float32, 0)
    student[2, 3] = math.nan
    student[4, 1] = math.nan
    labels[4] = -100
    student.requires_grad_()
    kd, ce, _ = kd_loss(student, teacher, labels, impl=impl)
    bad = torch.tensor([False, False, True, False, False, False])
    assert torch.equal(kd.isnan(), bad)
    assert torch.equal(ce.isnan(), bad)
    if impl != "reference":
        (grad,) = torch.autograd.grad((kd + ce).sum(), student)
        assert torch.equal(grad.isnan().any(1), bad)
        assert (grad[4] == 0).all()


@pytest.mark.parametrize("shape", [(6, 10), (6, 40)], ids=shape_id)
def test_classes_masked_with_minus_infinity(impl: str, shape) -> None:
    student, (teacher,), _ = kd_case(shape, torch.float32, 0)
    labels = torch.zeros(6, dtype=torch.long)
    want = kd_loss(student[:, :7], teacher[:, :7], labels, impl=impl)
    for x in (student, teacher):
        x[:, 7:] = -math.inf
    student.requires_grad_()
    got = kd_loss(student, teacher, labels, impl=impl)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad((got.kd + got.ce).sum(), student)
    assert grad.isfinite().all()
    assert (grad[:, 7:] == 0).all()


@pytest.mark.parametrize("shape", [(4, 10), (4, 40)], ids=shape_id)
@pytest.mark.parametrize("num_teachers", [1, 2])
def test_a_class_only_the_student_rules_out(impl: str, shape, num_teachers: int) -> None:
    """KL is infinite by its formula, its gradient T (p_s - p_t) is not: README, "Infinity"."""
    student, teachers, _ = kd_case(shape, torch.float32, 0)
    teachers = (teachers * 2)[:num_teachers]
    student[1, 3] = -math.inf
    student.requires_grad_()
    kd = kd_loss(student, teachers, temperature=4.0, impl=impl).kd
    (grad,) = torch.autograd.grad(0.5 * kd.sum(), student)
    p_s = (student.detach().double() / 4).softmax(1)
    p_t = torch.stack([(t.double() / 4).softmax(1) for t in teachers]).mean(0)
    assert torch.allclose(grad.double(), 0.5 * 4 * (p_s - p_t), rtol=1e-4, atol=1e-6)
    truth = 16 * (p_t * (p_t.log() - p_s.log())).sum(1)
    assert truth[1] == math.inf
    rest = [0, 2, 3]
    assert torch.allclose(kd[rest].double(), truth[rest], rtol=1e-4)
    # Infinity, NaN or, in C++, what its floor of -1e30 makes of it: never a plausible number.
    if impl == "cpp":
        expected = 16 * p_t[1, 3].item() * 1e30 / 4
        assert kd[1].item() == pytest.approx(expected, rel=1e-3)
    else:
        assert not kd[1].isfinite()


def test_large_logits_do_not_overflow(impl: str) -> None:
    student = torch.tensor([[1e4, 0.0, -1e4], [3e38, -3e38, 0.0]])
    kd, ce, _ = kd_loss(student, student.flip(1) / 2, torch.tensor([0, 1]), impl=impl)
    assert kd[0].isfinite()
    assert ce[0].isfinite()
    assert kd[0] > 1e3


def test_agreement_is_argmax_agreement_ties_included(impl: str) -> None:
    for shape in ((200, 6), (50, 40)):
        student, teacher = torch.randint(0, 3, (2, *shape)).float()
        want = (student.argmax(1) == teacher.argmax(1)).float()
        assert 0 < want.mean() < 1
        assert torch.equal(kd_loss(student, teacher, impl=impl).agree, want)


def test_no_gradient_reaches_teacher_or_soft_labels(impl: str) -> None:
    student, (teacher,), _ = kd_case((4, 6), torch.float32, 0)
    student.requires_grad_()
    teacher.requires_grad_()
    soft = torch.rand(4, 6).softmax(1).requires_grad_()
    kd_loss_mean(student, teacher, soft, impl=impl).backward()
    assert teacher.grad is None
    assert soft.grad is None
    assert student.grad is not None


BAD = {
    "class count": (
        lambda: kd_loss(torch.randn(4, 10), torch.randn(4, 9)),
        r"student logits are \[4, 10\] but teacher logits are \[4, 9\].*class list",
    ),
    "swapped": (
        lambda: kd_loss(torch.randn(4, 10), torch.randn(4, 10, requires_grad=True)),
        r"order is kd_loss\(student, teacher, labels\)",
    ),
    "temperature": (lambda: kd_loss(torch.randn(4, 10), temperature=0), "temperature=0"),
    "smoothing": (lambda: kd_loss(torch.randn(4, 10), label_smoothing=1.5), "label_smoothing=1.5"),
    "one class": (lambda: kd_loss(torch.randn(4, 1)), "got 1 classes"),
    "labels shape": (
        lambda: kd_loss(torch.randn(4, 10), None, torch.zeros(5, dtype=torch.long)),
        r"labels are \[5\]; expected \[4\]",
    ),
    "integer logits": (lambda: kd_loss(torch.ones(4, 10, dtype=torch.long)), "torch.int64"),
    "five teachers": (lambda: kd_loss(torch.randn(4, 10), [torch.randn(4, 10)] * 5), "at most 4"),
    "mask dtype": (lambda: kd_loss(torch.randn(4, 10), mask=torch.ones(4)), "expected torch.bool"),
    "weights shape": (lambda: kd_loss(torch.randn(4, 10), weights=torch.ones(3)), r"\[3\]"),
    "class dim": (lambda: kd_loss(torch.randn(4, 10, 3, 3), class_dim=2), "class_dim=2"),
    "teacher's device": (
        lambda: kd_loss(
            torch.randn(4, 10), [torch.randn(4, 10), torch.empty(4, 10, device="meta")]
        ),
        "teacher logits are on meta but student logits are on cpu; move them there",
    ),
    "labels' device": (
        lambda: kd_loss(torch.randn(4, 10), None, torch.empty(4, device="meta").long()),
        "labels are on meta but student logits are on cpu; move them there",
    ),
    "weights' device": (
        lambda: kd_loss(torch.randn(4, 10), weights=torch.empty(4, device="meta")),
        "weights are on meta",
    ),
    "mask's device": (
        lambda: kd_loss(torch.randn(4, 10), mask=torch.empty(4, device="meta").bool()),
        "mask is on meta",
    ),
    "impl": (lambda: kd_loss(torch.randn(4, 10), impl="cuda"), "impl='cuda'"),
    "probabilities": (
        lambda: kd_loss(torch.randn(4, 10).softmax(1), check=True),
        "these are probabilities",
    ),
    "label range": (
        lambda: kd_loss(torch.randn(4, 10), None, torch.tensor([0, 1, 10, 2]), check=True),
        "label 10 is out of range",
    ),
    "bool labels": (
        lambda: kd_loss(torch.randn(4, 10), None, torch.ones(4, dtype=torch.bool)),
        "labels are torch.bool; expected class indices",
    ),
    "labels' sum": (
        lambda: kd_loss(torch.randn(4, 10), None, 1.02 * torch.rand(4, 10).softmax(1), check=True),
        "labels are not probabilities: a row sums to 1.02",
    ),
    "negative labels": (
        lambda: kd_loss(torch.randn(1, 3), None, torch.tensor([[1.5, -0.5, 0.0]]), check=True),
        "a row sums to 1, its least value is -0.5",
    ),
    "infinite temperature": (
        lambda: kd_loss(torch.randn(4, 10), temperature=math.inf),
        "temperature=inf; expected a finite number above 0",
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("class_dim", [1, -1])
def test_probabilities_pass_the_check(dtype: torch.dtype, class_dim: int) -> None:
    """As far as rounding moves their sum; a row that is masked may hold anything."""
    logits = torch.randn(3, 1000, 2) if class_dim == 1 else torch.randn(3, 2, 1000)
    soft = (3 * torch.randn_like(logits)).softmax(class_dim).to(dtype)
    mask = torch.tensor([True, True, False])
    soft[2] = math.nan
    kd_loss(logits, None, soft, mask=mask, class_dim=class_dim, check=True)
    with pytest.raises(ValueError, match="a row sums to nan"):
        kd_loss(logits, None, soft, class_dim=class_dim, check=True)


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_named(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.usefixtures("needs_cpp")
@pytest.mark.parametrize("shape", [(6, 10), (6, 40)], ids=shape_id)
def test_bad_label_is_named_without_check(shape) -> None:
    student, others, labels = kd_case(shape, torch.float32, 0)
    labels[4] = 77
    with pytest.raises(ValueError, match="label 77 in row 4 is out of range"):
        kd_loss(student, others, labels, impl="cpp")
