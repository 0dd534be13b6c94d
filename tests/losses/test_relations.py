"""SP, PKT, CC and RKD: the released values, and the formulas written out in float64."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastkd.losses import CC, PKT, RKD, SP, LossTerm
from fastkd.testing import bind_pair, sines

ORACLE = json.loads((Path(__file__).parent / "feature_oracle.json").read_text())["values"]
PAIR = {"pooled": "pooled"}


def value(term: LossTerm, student: Tensor, teacher: Tensor) -> Tensor:
    inputs = bind_pair(term, student, teacher)
    return term.to(student.dtype)(inputs).parts[term.name]


def test_released_values() -> None:
    maps = sines((8, 6, 8, 8), 3), sines((8, 10, 4, 4), 4)
    rows = sines((8, 16), 7), sines((8, 24), 8)
    found = {
        "sp": value(SP(PAIR), *maps),
        "pkt": value(PKT(), *rows),
        "rkd_distance": value(RKD(distance_weight=1, angle_weight=0), *rows),
        "rkd_angle": value(RKD(distance_weight=0, angle_weight=1), *rows),
        "rkd_25d_50a": value(RKD(), *rows),
    }
    cc = CC(dim=12)
    inputs = bind_pair(cc, sines((8, 12), 9), sines((8, 12), 10))
    for embed in (cc.embed_student[0], cc.embed_teacher[0]):
        assert isinstance(embed, nn.Linear)
        nn.init.eye_(embed.weight)
        nn.init.zeros_(embed.bias)
    found["cc"] = cc.double()(inputs).parts["cc"]
    for name, got in found.items():
        assert got.item() == pytest.approx(ORACLE[name], rel=1e-6), name


def sp(_: LossTerm, s: Tensor, t: Tensor) -> Tensor:
    def unit(x: Tensor) -> Tensor:
        gram = torch.einsum("ichw,jchw->ij", x, x)
        return torch.stack([row / row.square().sum().sqrt() for row in gram])

    return ((unit(t) - unit(s)) ** 2).sum() / len(s) ** 2


def pkt(_: LossTerm, s: Tensor, t: Tensor) -> Tensor:
    def probabilities(x: Tensor) -> list[list[Tensor]]:
        rows = [row / (row.norm() + 1e-7) for row in x]
        similar = [[((a * b).sum() + 1) / 2 for b in rows] for a in rows]
        return [[entry / sum(row) for entry in row] for row in similar]

    p_s, p_t = probabilities(s), probabilities(t)
    places = list(product(range(len(s)), repeat=2))
    total = s.new_zeros(())
    for i, j in places:
        total = total + p_t[i][j] * torch.log((p_t[i][j] + 1e-7) / (p_s[i][j] + 1e-7))
    return total / len(places)


def cc(term: LossTerm, s: Tensor, t: Tensor) -> Tensor:
    assert isinstance(term, CC)
    student, teacher = term.embed_student[0], term.embed_teacher[0]
    mapped_s = torch.einsum("nd,ed->ne", s, student.weight) + student.bias
    mapped_t = torch.einsum("nd,ed->ne", t, teacher.weight) + teacher.bias
    apart = torch.maximum(mapped_s - mapped_t, mapped_t - mapped_s)
    return torch.stack([(apart[i] * apart[i + 1]).sum() for i in range(len(s) - 1)]).mean()


def rkd(_: LossTerm, s: Tensor, t: Tensor) -> Tensor:
    def huber(x: Tensor) -> Tensor:
        return torch.where(x.abs() < 1, 0.5 * x**2, x.abs() - 0.5)

    num = len(s)
    zero = s.new_zeros(())

    def distances(x: Tensor) -> dict[tuple[int, int], Tensor]:
        places = product(range(num), repeat=2)
        d = {(i, j): (x[i] - x[j]).square().sum().sqrt() if i != j else zero for i, j in places}
        mean = sum(d.values(), zero) / (num * num - num)
        return {place: entry / mean for place, entry in d.items()}

    def cosine(x: Tensor, i: int, j: int, k: int) -> Tensor:
        a, b = x[j] - x[i], x[k] - x[i]
        return (a * b).sum() / (a.norm() * b.norm()) if i not in (j, k) else zero

    d_s, d_t = distances(s), distances(t)
    distance = sum((huber(d_s[p] - d_t[p]) for p in d_s), zero) / num**2
    triples = list(product(range(num), repeat=3))
    angle = sum((huber(cosine(s, *p) - cosine(t, *p)) for p in triples), zero) / num**3
    return 25 * distance + 50 * angle


Formula = Callable[[LossTerm, Tensor, Tensor], Tensor]
CASES: dict[str, tuple[Callable[[], LossTerm], Formula, tuple[int, ...], tuple[int, ...]]] = {
    "sp": (lambda: SP(PAIR), sp, (7, 3, 5, 4), (7, 5, 3, 3)),
    "pkt": (PKT, pkt, (7, 5), (7, 9)),
    "cc": (lambda: CC(dim=6), cc, (7, 5), (7, 9)),
    "rkd": (RKD, rkd, (7, 5), (7, 9)),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_the_formulas(name: str) -> None:
    make, formula, student_shape, teacher_shape = CASES[name]
    student = torch.randn(student_shape, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(teacher_shape, dtype=torch.float64)
    term = make()
    got = value(term, student, teacher)
    expected = formula(term, student, teacher)
    leaves = [student, *term.parameters()]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    for one, other in zip(
        torch.autograd.grad(-1.7 * got, leaves),
        torch.autograd.grad(-1.7 * expected, leaves),
        strict=True,
    ):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_half_types_are_summed_in_fp32(name: str) -> None:
    make, _, student_shape, teacher_shape = CASES[name]
    student, teacher = torch.randn(student_shape).bfloat16(), torch.randn(teacher_shape).bfloat16()
    term = make()
    inputs = bind_pair(term, student, teacher)
    got = term(inputs).parts[name]
    assert got.dtype == torch.float32
    wide = {need: tensor.double() for need, tensor in inputs.tensors.items()}
    truth = term.double()(inputs._replace(tensors=wide)).parts[name]
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["sp", "pkt", "rkd"])
def test_equal_features_cost_nothing(name: str) -> None:
    make, _, shape, _ = CASES[name]
    student = torch.randn(shape, requires_grad=True)
    got = value(make(), student, student.detach())
    assert got.item() == 0
    assert torch.autograd.grad(got, student)[0].abs().max() < 1e-7


@pytest.mark.parametrize("name", CASES)
def test_degenerate_batches_are_finite(name: str) -> None:
    make, _, (_, *features), teacher_shape = CASES[name]
    # One sample; samples that coincide; nothing but zeros.
    for student in (torch.randn(1, *features), torch.ones(7, *features), torch.zeros(7, *features)):
        leaf = student.requires_grad_()
        got = value(make(), leaf, torch.randn(len(student), *teacher_shape[1:]))
        (gradient,) = torch.autograd.grad(got, leaf)
        assert torch.isfinite(got)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() < 1e3


def test_rkd_sees_neither_scale_nor_place_nor_rotation() -> None:
    teacher = torch.randn(9, 6, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    assert value(RKD(), 3.7 * teacher @ turn + 11, teacher).item() < 1e-12
    assert value(RKD(), teacher * torch.arange(6), teacher).item() > 0.1


def test_several_pairs_add_up() -> None:
    pairs = {"stage1": "stage1", "stage2": "stage3"}
    term = SP(pairs, weight=2.0, name="similar")
    assert (term.name, term.weights) == ("similar", {"similar": 2.0})
    shapes = [(5, 2, 4, 4), (5, 3, 4, 4), (5, 4, 2, 2), (5, 6, 1, 1)]
    tensors = [torch.randn(shape) for shape in shapes]
    inputs = bind_pair(SP(PAIR), *tensors[:2])._replace(
        tensors=dict(zip(term.needs, tensors, strict=True))
    )
    alone = value(SP(PAIR), *tensors[:2]) + value(SP(PAIR), *tensors[2:])
    torch.testing.assert_close(term(inputs).parts["similar"], alone)


def test_no_pair_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"sp needs at least one pair, e.g. pairs={'stage2'"):
        SP({})
