"""Pair losses on the maps of pictures that are not square, 184x240 and the like, and not alike.

Turning both maps must turn nothing else: a loss that mixes height and width up fails here. The
formulas are tested with each loss; here are the sizes.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastkd.errors import UserError
from fastkd.losses import (
    AB,
    AT,
    CC,
    CWD,
    FSP,
    FT,
    MGD,
    NST,
    PKT,
    RKD,
    SP,
    VID,
    FitNet,
    ReviewKD,
    StageMSE,
)
from fastkd.losses.base.pairs import pool_alike
from fastkd.losses.base.term import LossTerm
from fastkd.testing import bind_term, call_term

PAIR = {"stage2": "stage2"}
FREE: dict[str, Callable[[], LossTerm]] = {
    "at": lambda: AT(PAIR),
    "at-distance": lambda: AT(PAIR, form="distance"),
    "nst": lambda: NST(PAIR),
    "sp": lambda: SP(PAIR),
    "pkt": lambda: PKT(PAIR),
    "rkd": lambda: RKD(PAIR),
    "cwd": lambda: CWD(PAIR),
}
"""Losses without trained parts where the channels agree."""
TRAINED: dict[str, Callable[[], LossTerm]] = {
    "cc": lambda: CC(PAIR, dim=8),
    "cwd-conv": lambda: CWD(PAIR),
    "cwd-released": lambda: CWD(PAIR, connector="released"),
    "ft": lambda: FT(PAIR),
    "mgd": lambda: MGD(PAIR),
    "vid": lambda: VID(PAIR),
    "reviewkd": lambda: ReviewKD(student=("stage2",), teacher=("stage2",), warmup_epochs=0),
}
SIZES = [
    ((12, 15), (12, 15)),
    ((23, 30), (12, 15)),
    ((12, 15), (23, 30)),
    ((23, 15), (12, 30)),
    ((5, 17), (1, 9)),
]


def maps(student: tuple[int, ...], teacher: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    one, other = (
        torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        for shape in (student, teacher)
    )
    return one.requires_grad_(), other


def loss_of(term: LossTerm, student: Tensor, teacher: Tensor) -> Tensor:
    tensors = {need: student if "/student/" in need else teacher for need in term.needs}
    bind_term(term, tensors).double()
    parts = call_term(term, tensors).parts
    return torch.stack([weight * parts[name] for name, weight in term.weights.items()]).sum()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", FREE)
def test_a_loss_does_not_tell_height_from_width(
    name: str, sizes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    student, teacher = maps((4, *sizes[0]), (4, *sizes[1]))
    one = loss_of(FREE[name](), student, teacher)
    other = loss_of(FREE[name](), student.mT, teacher.mT)
    torch.testing.assert_close(one, other, rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(0.3 * loss, student)[0] for loss in (one, other)]
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", TRAINED)
def test_a_connected_loss_takes_every_size(
    name: str, sizes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    student, teacher = maps((4, *sizes[0]), (6, *sizes[1]))
    term = TRAINED[name]()
    loss = loss_of(term, student, teacher)
    assert torch.isfinite(loss)
    assert loss > 0
    gradients = torch.autograd.grad(loss, [student, *term.parameters()])
    assert all(torch.isfinite(one).all() for one in gradients)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_pooling_alike_averages_windows_of_the_larger_side(
    sizes: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    student, teacher = maps((4, *sizes[0]), (4, *sizes[1]))
    height, width = (min(pair) for pair in zip(*sizes, strict=True))

    def windows(size: int, parts: int) -> list[slice]:
        return [slice(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]

    for got, given in zip(pool_alike(student, teacher), (student, teacher), strict=True):
        rows = (windows(given.shape[2], height), windows(given.shape[3], width))
        expected = [[given[:, :, y, x].mean((2, 3)) for x in rows[1]] for y in rows[0]]
        stacked = torch.stack([torch.stack(line, 2) for line in expected], 2)
        torch.testing.assert_close(got, stacked)


@pytest.mark.parametrize("make", [FitNet, AB])
@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [
        ((92, 120), (46, 60), (3, 3)),
        ((46, 60), (92, 120), (4, 4)),
        ((23, 30), (12, 15), (3, 3)),
        ((12, 15), (23, 30), (3, 4)),
        ((45, 61), (23, 31), (3, 3)),
        ((7, 5), (4, 3), (4, 3)),
        ((12, 15), (12, 14), (1, 2)),
        ((46, 60), (23, 59), (24, 2)),
    ],
)
def test_hints_connect_halves_that_were_rounded_up(
    make: type[FitNet] | type[AB],
    student: tuple[int, int],
    teacher: tuple[int, int],
    kernel: tuple[int, int],
) -> None:
    one, other = maps((2, *student), (3, *teacher))
    term = make(PAIR)
    loss = loss_of(term, one, other)
    assert term.connectors[0][0].kernel_size == kernel
    assert torch.autograd.grad(loss, one)[0].abs().max() > 0


@pytest.mark.parametrize(
    ("student", "teacher"), [((92, 120), (23, 30)), ((23, 30), (92, 120)), ((12, 15), (24, 14))]
)
def test_hints_refuse_other_sizes(student: tuple[int, int], teacher: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"cannot bring .* or at most 31 pixels larger$"):
        loss_of(FitNet(PAIR), *maps((2, *student), (3, *teacher)))


def test_flows_and_equal_shapes() -> None:
    pairs = {"stage1": "stage1", "stage2": "stage2"}
    shapes = {"student/stage1": (4, 23, 30), "student/stage2": (5, 12, 30)}
    shapes |= {"teacher/stage1": (4, 46, 15), "teacher/stage2": (5, 46, 8)}
    generator = torch.Generator().manual_seed(4)
    tensors = {
        f"x/{tap}": torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        for tap, shape in shapes.items()
    }
    term, turned = FSP(pairs), FSP(pairs)
    bind_term(term, tensors)
    bind_term(turned, {need: x.mT for need, x in tensors.items()})
    one = call_term(term, tensors).parts["fsp"]
    other = call_term(turned, {need: x.mT for need, x in tensors.items()}).parts["fsp"]
    torch.testing.assert_close(one, other, rtol=1e-9, atol=0)
    with pytest.raises(UserError, match="compares tensors of one shape"):
        loss_of(StageMSE(PAIR), *maps((4, 23, 30), (4, 12, 15)))
