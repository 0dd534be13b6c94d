"""FitNet, VID and AB: the released values, the formulas in float64, connectors of every size."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.losses import AB, VID, FitNet
from fastkd.losses.base.term import LossTerm
from fastkd.testing import bind_pair, bind_term, call_term, sines

ORACLE = json.loads((Path(__file__).parent / "feature_oracle.json").read_text())["values"]
PAIR = {"stage2": "stage2"}


def test_released_value_of_vid() -> None:
    term = VID(PAIR)
    inputs = bind_pair(term, sines((8, 6, 8, 8), 3), sines((8, 10, 4, 4), 4))
    (rho,) = term.rho
    assert rho.requires_grad
    assert rho.tolist() == pytest.approx([ORACLE["vid_init_log_scale"]] * 10, rel=1e-6)
    variance = F.softplus(rho.double()) + 1e-5
    assert variance.tolist() == pytest.approx([ORACLE["vid_init_var"]] * 10, rel=1e-6)
    term.double()
    with torch.no_grad():
        rho.fill_(ORACLE["vid_init_log_scale"])
        for number, place in enumerate((0, 2, 4)):
            weight = term.regressors[0][place].weight
            weight.copy_(sines(tuple(weight.shape), 11 + number, 0.3))
    got = term(inputs).parts["vid"].item()
    assert got == pytest.approx(ORACLE["vid_single_level_init"], rel=1e-6)


def test_released_value_of_fitnet() -> None:
    term = FitNet(PAIR)
    inputs = bind_pair(term, sines((8, 6, 4, 4), 5), sines((8, 6, 4, 4), 6))
    term.connectors[0] = nn.Identity()
    assert term(inputs).parts["fitnet"].item() == pytest.approx(ORACLE["fitnet_hint_mse"], rel=1e-6)


@pytest.mark.parametrize("level", [0, 1])
def test_released_values_of_ab(level: int) -> None:
    shapes = ((8, 6, 8, 8), (8, 6, 4, 4))
    term = AB({"stage1": "stage1", "stage2": "stage2"})
    maps = [sines(shapes[k], 28 + k + 2 * net, 2) for k in (0, 1) for net in (0, 1)]
    # The other level beyond the margin on the teacher's side, where it costs nothing.
    maps[2 * (1 - level)] = torch.where(maps[2 * (1 - level) + 1] > 0, 3.0, -3.0).double()
    tensors = dict(zip(term.needs, maps, strict=True))
    bind_term(term, tensors)
    assert list(term.parameters()) == []
    got = call_term(term, tensors).parts["ab"].item()
    assert got == pytest.approx(ORACLE[f"ab_level{level}_of2"], rel=1e-6)


def check_value_and_gradients(
    term: LossTerm, student: Tensor, got: Tensor, expected: Tensor
) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    leaves = [student, *term.parameters()]
    gradients = [torch.autograd.grad(0.3 * x, leaves) for x in (got, expected)]
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("sides", [(6, 3), (3, 6), (5, 5)])
def test_vid_is_the_gaussian_likelihood(sides: tuple[int, int]) -> None:
    student = torch.randn(3, 4, sides[0], sides[0], dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, sides[1], sides[1], dtype=torch.float64)
    term = VID(PAIR)
    inputs = bind_pair(term, student, teacher)
    term.double()
    with torch.no_grad():
        term.rho[0].add_(torch.randn(5))

    def pooled(maps: Tensor) -> Tensor:
        times = maps.shape[2] // min(sides)
        return maps.unflatten(3, (-1, times)).unflatten(2, (-1, times)).mean((3, 5))

    hidden = torch.einsum("nchw,dc->nhwd", pooled(student), term.regressors[0][0].weight[..., 0, 0])
    for place in (2, 4):
        hidden = torch.clamp(hidden, min=0) @ term.regressors[0][place].weight[..., 0, 0].T
    variance = torch.log1p(torch.exp(term.rho[0])) + 1e-5
    likelihood = torch.distributions.Normal(hidden, variance.sqrt())
    nll = -likelihood.log_prob(pooled(teacher).permute(0, 2, 3, 1))
    # log_prob has the constant log(2 pi) / 2, which the loss leaves out.
    expected = nll.mean() - 0.5 * math.log(2 * math.pi)
    check_value_and_gradients(term, student, term(inputs).parts["vid"], expected)


@pytest.mark.parametrize(
    ("student_shape", "teacher_shape", "kernel"),
    [
        ((4, 6, 6), (5, 3, 3), (3, 3)),
        ((4, 3, 5), (5, 6, 10), (4, 4)),
        ((4, 5, 5), (5, 5, 5), (1, 1)),
        ((4, 7, 5), (5, 5, 4), (3, 2)),
    ],
)
def test_fitnet_connects_every_size(
    student_shape: tuple[int, ...], teacher_shape: tuple[int, ...], kernel: tuple[int, int]
) -> None:
    student = torch.randn(3, *student_shape, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, *teacher_shape, dtype=torch.float64)
    term = FitNet(PAIR)
    inputs = bind_pair(term, student, teacher)
    term.double()
    convolution, norm, _ = term.connectors[0]
    assert convolution.kernel_size == kernel
    with torch.no_grad():
        norm.weight.add_(0.1 * torch.randn(5))
        norm.bias.add_(0.1 * torch.randn(5))
    got = term(inputs).parts["fitnet"]
    moved = convolution(student)
    mean, variance = moved.mean((0, 2, 3)), moved.var((0, 2, 3), unbiased=False)
    unit = (moved - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
    predicted = (unit * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    assert predicted.shape == teacher.shape
    check_value_and_gradients(
        term, student, got, ((predicted - teacher) ** 2).sum() / teacher.numel()
    )


@pytest.mark.parametrize("shape", [(4, 10, 6), (5, 5, 3)])
def test_ab_is_the_squared_distance_to_the_boundary(shape: tuple[int, ...]) -> None:
    student = (2 * torch.randn(3, *shape, dtype=torch.float64)).requires_grad_()
    teacher = torch.randn(3, 5, 5, 3, dtype=torch.float64)
    teacher[0, 0, 0] = 0  # counts as not active
    term = AB(PAIR, margin=0.7)
    inputs = bind_pair(term, student, teacher)
    term.double()
    moved = student
    if shape != teacher.shape[1:]:
        convolution, norm = term.connectors[0]
        moved = convolution(student)
        mean, variance = moved.mean((0, 2, 3)), moved.var((0, 2, 3), unbiased=False)
        moved = (moved - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
        moved = moved * norm.weight[:, None, None] + norm.bias[:, None, None]
    # As the reference writes it: four cases, of which two cost nothing.
    off = (moved > -0.7) & (teacher <= 0)
    on = (moved <= 0.7) & (teacher > 0)
    total = ((moved + 0.7) ** 2)[off].sum() + ((moved - 0.7) ** 2)[on].sum()
    check_value_and_gradients(term, student, term(inputs).parts["ab"], total / len(student) * 0.003)


def test_ab_halves_the_weight_of_each_pair_before_the_last() -> None:
    student, teacher = torch.randn(2, 3, 5, 4).double(), torch.randn(2, 3, 5, 4).double()
    term, alone = AB({f"stage{k}": f"stage{k}" for k in (1, 2, 3)}), AB(PAIR)
    tensors = dict(zip(term.needs, 3 * (student, teacher), strict=True))
    bind_term(term, tensors)
    one = alone(bind_pair(alone, student, teacher)).parts["ab"]
    torch.testing.assert_close(call_term(term, tensors).parts["ab"], 1.75 * one)


def test_connectors_run_in_the_type_of_the_features_and_sum_in_fp32() -> None:
    for term in (VID(PAIR), FitNet(PAIR), AB(PAIR)):
        student, teacher = torch.randn(3, 4, 6, 6).bfloat16(), torch.randn(3, 5, 3, 3).bfloat16()
        got = term(bind_pair(term, student, teacher)).parts[term.name]
        assert got.dtype == torch.float32
        assert torch.isfinite(got)


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(UserError, match="a student's map of 4x4 to the teacher's 6x6"):
        bind_pair(FitNet(PAIR), torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 6, 6))
    with pytest.raises(UserError, match=r"losses.ab cannot bring a student's map of 4x4 to the"):
        bind_pair(AB(PAIR), torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 6, 6))
    with pytest.raises(UserError, match=r"but x/teacher/stage2 is \[5\] per image"):
        bind_pair(VID(PAIR), torch.zeros(2, 3, 4, 4), torch.zeros(2, 5))
