"""NST: the released value, and the kernel means written out, in both of its forms."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.errors import UserError
from fastkd.losses import NST
from fastkd.testing import assert_as_accurate, bind_pair, sines

ORACLE = json.loads((Path(__file__).parent / "feature_oracle.json").read_text())["values"]
PAIR = {"stage1": "stage1"}

# More pixels than channels, fewer of them, and maps of two sizes.
SHAPES = {
    "channels": ((3, 5, 4, 7), (3, 7, 4, 7)),
    "pixels": ((3, 13, 2, 3), (3, 4, 2, 3)),
    "pooled": ((3, 5, 8, 8), (3, 7, 4, 4)),
}


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    term = NST(PAIR)
    return term(bind_pair(term, student, teacher)).parts["nst"]


def written_out(student: Tensor, teacher: Tensor) -> Tensor:
    times = student.shape[2] // teacher.shape[2]
    if times > 1:
        student = student.unflatten(3, (-1, times)).unflatten(2, (-1, times)).mean((3, 5))

    def kernel_mean(a: Tensor, b: Tensor) -> Tensor:
        a, b = (x / x.square().sum((2, 3), keepdim=True).sqrt() for x in (a, b))
        return (a[:, :, None] * b[:, None]).sum((3, 4)).square().mean()

    same = kernel_mean(teacher, teacher) + kernel_mean(student, student)
    return same - 2 * kernel_mean(student, teacher)


def test_released_value() -> None:
    got = nst(sines((8, 6, 8, 8), 3), sines((8, 10, 4, 4), 4)).item()
    assert got == pytest.approx(ORACLE["nst_single_level"], rel=1e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_value_and_gradient_are_the_formula(name: str) -> None:
    student, teacher = (torch.randn(shape, dtype=torch.float64) for shape in SHAPES[name])
    student.requires_grad_()
    got, expected = nst(student, teacher), written_out(student, teacher)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    one, other = (torch.autograd.grad(-2.5 * x, student)[0] for x in (got, expected))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("shape", [(4, 8, 16, 16), (4, 96, 4, 4)])
def test_fp32_is_as_accurate_as_the_formula(shape: tuple[int, ...]) -> None:
    student, teacher = F.relu(torch.randn(shape)), F.relu(torch.randn(shape))
    found = {}
    for name, compute, dtype in (
        ("got", nst, torch.float32),
        ("eager", written_out, torch.float32),
        ("truth", written_out, torch.float64),
    ):
        leaf = student.to(dtype).requires_grad_()
        loss = compute(leaf, teacher.to(dtype))
        found[name] = loss.detach(), torch.autograd.grad(loss, leaf)[0]
    losses, gradients = zip(*(found[name] for name in ("got", "eager", "truth")), strict=True)
    assert_as_accurate("loss", *losses, floor=losses[2].item() * 2**-23)
    assert_as_accurate("gradient", *gradients)


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (2, 40, 4, 4)])
def test_dead_channels_and_equal_maps(shape: tuple[int, ...]) -> None:
    maps = torch.randn(shape)
    maps[:, 1] = 0
    student = maps.clone().requires_grad_()
    loss = nst(student, maps)
    assert abs(loss.item()) < 1e-6
    (gradient,) = torch.autograd.grad(nst(student, torch.randn(shape)), student)
    assert torch.isfinite(gradient).all()
    assert (gradient[:, 1] == 0).all()


def test_nothing_is_as_large_as_the_product_of_all_channels() -> None:
    student, teacher = torch.randn(4, 64, 16, 16), torch.randn(4, 64, 16, 16)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Sizes():
        nst(student.requires_grad_(), teacher).backward()
    assert largest == student.numel()  # 65 thousand; the product would have 4 million


def test_rows_are_no_maps() -> None:
    with pytest.raises(UserError, match=r"losses.nst compares maps \[C, H, W\], but x/student/st"):
        bind_pair(NST(PAIR), torch.zeros(2, 3), torch.zeros(2, 3, 4, 4))
