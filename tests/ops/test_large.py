"""Logits beyond 2^31 elements and rows of a million classes: addresses are 64 bits wide."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastkd.kernels import hardness, kd_loss
from fastkd.testing import assert_as_accurate, eager_hardness, eager_kd_rows, kd_case, rms

# Row 4 starts 2^32 elements after row 0: beyond what 32 bits, signed or not, can say.
STRIDE = 2**30


def far_apart(rows: Tensor, folder: Path) -> Tensor:
    """The same rows, STRIDE elements apart, in a file full of holes: a page of memory each."""
    file = folder / "holes"
    size = (len(rows) - 1) * STRIDE + rows.shape[1]
    spread = torch.from_file(str(file), shared=True, size=size, dtype=rows.dtype)
    file.unlink()
    return spread.as_strided(rows.shape, (STRIDE, 1)).copy_(rows)


@pytest.mark.parametrize("classes", [10, 40])
def test_rows_that_lie_beyond_32_bits(fast: str, classes: int, tmp_path: Path) -> None:
    student, (teacher,), labels = kd_case((5, classes), torch.bfloat16, 0)
    want = kd_loss(student, teacher, labels, impl=fast)
    far = far_apart(student, tmp_path).requires_grad_()
    got = kd_loss(far, far_apart(teacher, tmp_path), labels, impl=fast)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    leaf = student.clone().requires_grad_()
    (want_grad,) = torch.autograd.grad(kd_loss(leaf, teacher, labels, impl=fast).kd.sum(), leaf)
    assert torch.equal(torch.autograd.grad(got.kd.sum(), far)[0], want_grad)
    scores = hardness(far.detach(), far_apart(teacher, tmp_path), impl=fast)
    assert torch.equal(scores, hardness(student, teacher, impl=fast))


@pytest.mark.usefixtures("needs_cpp")
def test_a_million_classes() -> None:
    student, (teacher,), labels = kd_case((2, 1_000_003), torch.float32, 0)
    student.requires_grad_()
    kd, ce, agree = kd_loss(student, teacher, labels, impl="cpp")
    (grad,) = torch.autograd.grad(3 * kd.sum() + ce.sum(), student)
    assert torch.equal(agree, (student.argmax(1) == teacher.argmax(1)).float())
    scores = hardness(student.detach(), teacher, impl="cpp")

    def plain(wide: torch.dtype) -> list[Tensor]:
        leaf, other = student.detach().to(wide).requires_grad_(), teacher.to(wide)
        rows = eager_kd_rows(leaf, [other], labels, 4.0)
        (grad,) = torch.autograd.grad(3 * rows[0].sum() + rows[1].sum(), leaf)
        score = eager_hardness(leaf.detach(), other, labels, "kl")
        return [rows[0].detach(), rows[1].detach(), grad, score]

    sides = [[kd.detach(), ce.detach(), grad, scores], plain(torch.float32), plain(torch.float64)]
    for name, *values in zip(("kd", "ce", "grad", "hardness"), *sides, strict=True):
        floor = 0.0 if name == "grad" else torch.finfo(torch.float32).eps * rms(values[2])
        assert_as_accurate(name, *values, floor=floor)
