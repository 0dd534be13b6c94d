"""FSP: the released values, the mean products written out, what it refuses."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.errors import UserError
from fastkd.losses import FSP
from fastkd.testing import bind_term, call_term, sines

ORACLE = json.loads((Path(__file__).parent / "feature_oracle.json").read_text())["values"]
TAPS = ("stem", "stage1", "stage2")


def fsp(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    term = FSP({tap: tap for tap in TAPS[: len(students)]})
    maps = [m for pair in zip(students, teachers, strict=True) for m in pair]
    tensors = dict(zip(term.needs, maps, strict=True))
    bind_term(term, tensors)
    assert list(term.parameters()) == []
    return call_term(term, tensors).parts["fsp"]


def written_out(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    def flow(maps: list[Tensor], k: int) -> Tensor:
        one, two = maps[k], maps[k + 1]
        size = [min(a, b) for a, b in zip(one.shape[2:], two.shape[2:], strict=True)]
        one, two = (F.interpolate(m, size, mode="area") for m in (one, two))
        return torch.einsum("nahw,nbhw->nab", one, two) / (size[0] * size[1])

    total = students[0].new_zeros(())
    for k in range(len(students) - 1):
        apart = flow(students, k) - flow(teachers, k)
        total = total + (apart * apart).sum() / apart.numel()
    return total


def test_released_values() -> None:
    shapes = [(8, 4, 8, 8), (8, 6, 8, 8), (8, 6, 4, 4)]
    students, teachers = ([sines(s, a + k) for k, s in enumerate(shapes)] for a in (20, 23))
    for k in (0, 1):
        got = fsp(students[k : k + 2], teachers[k : k + 2]).item()
        assert got == pytest.approx(ORACLE[f"fsp_pair{k}"], rel=1e-6)
    both = ORACLE["fsp_pair0"] + ORACLE["fsp_pair1"]
    assert fsp(students, teachers).item() == pytest.approx(both, rel=1e-6)


@pytest.mark.parametrize("sides", [((6, 4), (6, 4), (3, 2)), ((3, 5), (7, 5), (4, 9))])
def test_value_and_gradient_are_the_formula(sides: tuple[tuple[int, int], ...]) -> None:
    shapes = [(3, 4, *sides[0]), (3, 7, *sides[1]), (3, 2, *sides[2])]
    students = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    # A teacher of another resolution.
    teachers = [torch.randn(n, c, h + 2, w, dtype=torch.float64) for n, c, h, w in shapes]
    got, expected = fsp(students, teachers), written_out(students, teachers)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(-1.3 * x, students) for x in (got, expected)]
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)


def test_half_types_are_summed_in_fp32() -> None:
    shapes = [(3, 4, 8, 8), (3, 6, 8, 8), (3, 6, 4, 4)]
    students, teachers = ([torch.randn(s).bfloat16() for s in shapes] for _ in range(2))
    got = fsp(students, teachers)
    assert got.dtype == torch.float32
    truth = written_out([m.double() for m in students], [m.double() for m in teachers])
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=0)


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="fsp compares consecutive taps: give two or more"):
        FSP({"stage1": "stage1"})
    maps = [torch.zeros(2, c, 4, 4) for c in (3, 5)]
    message = (
        "but x/student/stage1 has 5 channels and x/teacher/stage1 has 7: pair taps of equal width, "
        "or use losses.fitnet"
    )
    with pytest.raises(UserError, match=message):
        fsp(maps, [maps[0], torch.zeros(2, 7, 4, 4)])
    with pytest.raises(UserError, match=r"losses.fsp compares maps \[C, H, W\], but x/student/sta"):
        fsp([maps[0], torch.zeros(2, 5)], maps)
