"""`attention_map` and its loss at the edges: layouts, empty batches, NaN, wrong input."""

import math

import pytest
import torch
from torch import Tensor

from fastkd.kernels import attention_loss, attention_map

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pair(student: tuple[int, ...] = (4, 6, 6, 10), channels: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randn(student), torch.randn(student[0], channels, *student[2:])


def arranged(x: Tensor) -> dict[str, Tensor]:
    """The same values in memory of different order, with NaN wherever nothing should be read."""
    num, channels, height, width = x.shape

    def inside(
        shape: tuple[int, ...], part: tuple, memory_format=torch.contiguous_format
    ) -> Tensor:
        around = torch.full(shape, math.nan).to(memory_format=memory_format)
        around[part] = x
        return around[part]

    last = torch.channels_last
    return {
        "nchw": x.contiguous(),
        "channels-last": x.contiguous(memory_format=last),
        "every second sample": inside((2 * num, channels, height, width), (slice(0, None, 2),)),
        "some channels": inside((num, channels + 3, height, width), (slice(None), slice(1, -2))),
        "some channels, last": inside(
            (num, channels + 3, height, width), (slice(None), slice(1, -2)), last
        ),
        "every second pixel": inside((num, channels, height, 2 * width), (..., slice(0, None, 2))),
        "some rows": inside((num, channels, height + 2, width), (..., slice(1, -1), slice(None))),
        "some columns, last": inside((num, channels, height, width + 2), (..., slice(1, -1)), last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "samples last": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }


@pytest.mark.interpreter_share(window=[1])
@pytest.mark.parametrize("window", [1, 2])
def test_memory_order_does_not_matter(impl: str, window: int) -> None:
    student, teacher = pair()
    teacher = teacher.repeat_interleave(window, 2).repeat_interleave(window, 3)
    results: list[list[Tensor]] = []
    teachers = arranged(teacher)
    for name, s in arranged(student).items():
        for t in (teachers[name], teachers["nchw"], teachers["channels-last"]):
            leaf = s.detach().requires_grad_()
            loss = attention_loss(leaf, t, impl=impl)
            (grad,) = torch.autograd.grad(3 * loss, leaf)
            small = attention_map(leaf, size=(6 // window, 10 // window), impl=impl)
            (map_grad,) = torch.autograd.grad(small.square().square().sum(), leaf)
            results.append([loss.detach(), small.detach(), grad, map_grad])
            if name in ("nchw", "channels-last"):
                assert impl == "reference" or grad.stride() == leaf.stride()
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 3, 5, 1), (2, 1, 4, 3), (3, 2, 1, 1), (1, 1, 1, 7), (2, 7, 1, 5)], ids=str
)
def test_dimensions_of_one(impl: str, shape, channels_last: bool) -> None:
    order = torch.channels_last if channels_last else torch.contiguous_format
    student, teacher = (x.to(memory_format=order) for x in pair(shape, 4))
    student.requires_grad_()
    got = attention_loss(student, teacher, impl=impl)
    leaf = student.detach().double().requires_grad_()
    want = attention_loss(leaf, teacher.double(), impl="reference")
    assert got.item() == pytest.approx(want.item(), rel=2e-6, abs=1e-12)
    (grad,) = torch.autograd.grad(got, student)
    torch.testing.assert_close(
        grad.double(), torch.autograd.grad(want, leaf)[0], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("form", ["mean_square", "distance"])
def test_empty_batch(impl: str, form: str) -> None:
    student, teacher = pair((0, 6, 4, 4))
    student.requires_grad_()
    loss = attention_loss(student, teacher, form=form, impl=impl)
    assert loss.item() == 0
    loss.backward()
    assert student.grad is not None
    assert student.grad.shape == student.shape
    assert attention_map(student, impl=impl).shape == (0, 16)


def test_nan_reaches_its_own_sample_only(impl: str) -> None:
    student, teacher = pair()
    student[1, 2, 3, 4] = math.nan
    bad = torch.tensor([False, True, False, False])
    student.requires_grad_()
    found = attention_map(student, impl=impl)
    assert torch.equal(found.isnan().any(1), bad)
    (grad,) = torch.autograd.grad(found.square().square().sum(), student)
    assert torch.equal(grad.isnan().flatten(1).any(1), bad)
    loss = attention_loss(student, teacher, impl=impl)
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, student)
    assert torch.equal(grad.isnan().flatten(1).any(1), bad)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_second_backward_and_inputs_left_alone(impl: str, scale: float, dtype) -> None:
    student, teacher = (x.to(dtype) for x in pair())
    student.requires_grad_()
    before = [x.detach().clone() for x in (student, teacher)]
    loss = scale * attention_loss(student, teacher, impl=impl)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert first.dtype == dtype
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, student)
    assert torch.equal(second, kept)
    for now, then in zip((student.detach(), teacher), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float64),
        (torch.float64, torch.bfloat16),
    ],
    ids=str,
)
def test_mixed_dtypes(impl: str, student_dtype, teacher_dtype) -> None:
    student, teacher = pair()
    student, teacher = student.to(student_dtype).requires_grad_(), teacher.to(teacher_dtype)
    loss = attention_loss(student, teacher, impl=impl)
    double = torch.float64 in (student_dtype, teacher_dtype)
    assert loss.dtype == (torch.float64 if double else torch.float32)
    want = attention_loss(student.double(), teacher.double(), impl="reference")
    assert loss.item() == pytest.approx(want.item(), rel=1e-12 if double else 2e-6)
    assert torch.autograd.grad(loss, student)[0].dtype == student_dtype


def test_no_gradient_reaches_the_teacher(impl: str) -> None:
    student, teacher = (x.requires_grad_() for x in pair())
    attention_loss(student, teacher, impl=impl).backward()
    assert teacher.grad is None
    assert student.grad is not None
    frozen = attention_loss(student.detach(), teacher.detach(), impl=impl)
    assert not frozen.requires_grad


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.usefixtures("needs_cpp")
def test_repeats_bit_by_bit_on_any_number_of_threads(threads: int, channels_last: bool) -> None:
    order = torch.channels_last if channels_last else torch.contiguous_format
    student, teacher = (x.to(memory_format=order) for x in pair((5, 40, 36, 36), 70))
    before = torch.get_num_threads()
    results = []
    try:
        for count in (2, threads, threads):
            torch.set_num_threads(count)
            leaf = student.clone().requires_grad_()
            loss = attention_loss(leaf, teacher, impl="cpp")
            results.append((loss.item(), torch.autograd.grad(loss, leaf)[0]))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert loss == results[0][0]
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.usefixtures("needs_cpp")
def test_every_instruction_set_gives_the_same(dtype: torch.dtype) -> None:
    from fastkd.kernels._library import Core, core
    from fastkd.kernels.attention_map import cpu

    found = core()
    assert isinstance(found, Core)
    student, teacher = (x.to(dtype) for x in pair((2, 37, 5, 8), 21))
    for order in (torch.contiguous_format, torch.channels_last):
        sides = [x.to(memory_format=order) for x in (student, teacher)]
        results = []
        for isa in found.isas:
            loss, coefficients, _ = cpu.loss(*sides, 2, (1, 2), (1, 2), 1e-12, False, isa)
            grad = cpu.energy_grad(sides[0], coefficients, None, 2, (1, 2), isa)
            results.append((loss, grad))
        for loss, grad in results[1:]:
            torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=0)
            # A number in the middle between two of the stored type may round either way.
            tolerance = 1e-5 if dtype.itemsize > 2 else torch.finfo(dtype).eps
            torch.testing.assert_close(grad, results[0][1], rtol=tolerance, atol=1e-9)


X = torch.randn(2, 3, 4, 4)
BAD = {
    "three dimensions": (lambda: attention_map(X[0]), r"\[3, 4, 4\]; expected \[N, C, H, W\]"),
    "no pixels": (lambda: attention_map(X[:, :, :0]), r"\[2, 3, 0, 4\]"),
    "integers": (lambda: attention_map(X.long()), "torch.int64; expected fp32"),
    "power": (lambda: attention_map(X, p=0.5), "p=0.5; expected at least 1"),
    "eps": (lambda: attention_map(X, eps=0), "eps=0; expected a number above 0"),
    "size": (lambda: attention_map(X, size=(5, 4)), r"size=\(5, 4\) for features \[2, 3, 4, 4\]"),
    "batch": (lambda: attention_loss(X, X[:1]), "expected the same images"),
    "form": (lambda: attention_loss(X, X, form="l1"), "form='l1' is neither"),
    "swapped": (
        lambda: attention_loss(X, X.clone().requires_grad_()),
        r"order is attention_loss\(student, teacher\)",
    ),
    "impl": (lambda: attention_map(X, impl="cuda"), "impl='cuda'"),
    "device": (lambda: attention_loss(X, X.to("meta")), "on the same device"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_named(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_what_a_kernel_cannot_do_is_said(fast: str) -> None:
    with pytest.raises(ValueError, match=rf"impl='{fast}' has p = \(1, 2, 4\), not 3"):
        attention_loss(X, X, p=3, impl=fast)
    if fast == "triton":
        with pytest.raises(ValueError, match="not fp64"):
            attention_map(X.double(), impl=fast)
