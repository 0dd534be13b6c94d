"""`attention_map` and its loss against float64, published numbers and a formula written otherwise.

With TRITON_INTERPRET=1 the same tests run the Triton kernels on the CPU; a test of the Triton
kernels starts a process that does.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.kernels import attention_loss, attention_map
from fastkd.testing import assert_as_accurate, eager_attention_loss, rms

ORACLE = json.loads((Path(__file__).parent / "attention_oracle.json").read_text())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {"nchw": torch.contiguous_format, "last": torch.channels_last}
# samples, student's channels, teacher's channels, size: odd ones, a map longer than a line, and
# more channels than are added up in one go.
SHAPES = {
    "odd": (3, 5, 8, (7, 9)),
    "aligned": (2, 32, 64, (8, 8)),
    "long": (2, 6, 3, (37, 36)),
    "deep": (2, 300, 130, (5, 5)),
}


def features(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Like features after a ReLU in one half of the channels, of either sign in the other."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, ::2].clamp_(min=0)
    return (3 * x).to(dtype)


def pair(name: str, layout: str, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    num, student, teacher, size = SHAPES[name]
    return tuple(
        features((num, channels, *size), 2 * seed + i, dtype).to(memory_format=LAYOUTS[layout])
        for i, channels in enumerate((student, teacher))
    )


def cosine_loss(student: Tensor, teacher: Tensor, p: float, form: str) -> Tensor:
    """The same from the angle between the energies: ||a/|a| - b/|b| ||^2 = 2 - 2 cos(a, b)."""
    energies = [torch.einsum("nchw->nhw", x.abs() ** p).flatten(1) for x in (student, teacher)]
    dots = [(energies[i] * energies[j]).sum(1) for i, j in ((0, 1), (0, 0), (1, 1))]
    square = 2 - 2 * dots[0] / (dots[1] * dots[2]).sqrt()
    return square.sqrt().mean() if form == "distance" else square.mean() / energies[0].shape[1]


@pytest.mark.interpreter_share(shape=["odd"], dtype=[torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_against_float64_is_at_most_twice_eager(fast, interpreted, shape, dtype, layout):
    """RMS over seeds of map, loss and gradient; eager is plain torch in fp32."""
    parts: dict[str, list[list[Tensor]]] = {"map": [], "loss": [], "grad": []}
    # The interpreter is slow: fewer seeds.
    for seed in range(4 if interpreted else 10):
        student, teacher = pair(shape, layout, seed, dtype)
        up = 1 + seed / 3
        for values in parts.values():
            values.append([])
        for kind in ("got", "eager", "truth"):
            wide = torch.float64 if kind == "truth" else torch.float32
            leaf = (student if kind == "got" else student.to(wide)).detach().requires_grad_()
            if kind == "got":
                loss, found = (
                    attention_loss(leaf, teacher, impl=fast),
                    attention_map(leaf, impl=fast),
                )
            else:
                loss = eager_attention_loss(leaf, teacher.to(wide))
                found = F.normalize(leaf.pow(2).mean(1).flatten(1))
            (grad,) = torch.autograd.grad(up * loss, leaf)
            grad = grad if kind == "truth" else grad.to(dtype)
            for name, value in (("map", found), ("loss", loss), ("grad", grad)):
                parts[name][-1].append(value.detach())
    for name, runs in parts.items():
        got, eager, truth = (torch.stack([run[i] for run in runs]) for i in range(3))
        # A loss may always be off by one unit in the last place.
        floor = torch.finfo(torch.float32).eps * rms(truth) if name == "loss" else 0.0
        factor = 2.0
        if interpreted and shape == "deep":
            factor = 8.0  # it adds the 512 rows of a tile one by one, where a chip adds as a tree
        assert_as_accurate(f"{name} {fast} {dtype}", got, eager, truth, factor=factor, floor=floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_published_values(impl: str, dtype: torch.dtype) -> None:
    """RepDistiller's loss with pooling, on inputs that a rule makes."""
    want = ORACLE["sines"]
    sides = []
    for side in ("student", "teacher"):
        shape, a = want[side]["shape"], want[side]["a"]
        i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        sides.append(torch.sin(12.9898 * (i + 1) + 78.233 * a).view(shape).to(dtype))
    tolerance = 1e-6 if dtype == torch.float64 else 2e-6
    for order in (LAYOUTS["nchw"], LAYOUTS["last"]):
        got = attention_loss(*(x.to(memory_format=order) for x in sides), impl=impl)
        assert got.dtype == dtype
        assert got.item() == pytest.approx(want["loss"], rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moonshine_vector(impl: str, dtype: torch.dtype) -> None:
    """Maps and loss of the released code; and the norm that equation 2 prints, from those maps."""
    want = ORACLE["moonshine"]
    student, teacher = (
        torch.tensor(want[f"{side}_act"], dtype=dtype) for side in ("student", "teacher")
    )
    tolerance = 1e-6 if dtype == torch.float64 else 2e-6
    for x, side in ((student, "student"), (teacher, "teacher")):
        for got, row in zip(attention_map(x, impl=impl), want[f"{side}_map"], strict=True):
            assert got.tolist() == pytest.approx(row, rel=tolerance)
    loss = attention_loss(student, teacher, impl=impl).item()
    assert loss == pytest.approx(want["loss"], rel=tolerance)
    norms = [
        sum((a - b) ** 2 for a, b in zip(*maps, strict=True)) ** 0.5
        for maps in zip(want["student_map"], want["teacher_map"], strict=True)
    ]
    distance = attention_loss(student, teacher, form="distance", impl=impl).item()
    assert distance == pytest.approx(sum(norms) / len(norms), rel=tolerance)


def eager_loss(student: Tensor, teacher: Tensor, p: float, form: str) -> Tensor:
    """The formula as it is printed, in plain torch."""
    gap = eager_map(student, p) - eager_map(teacher, p)
    return gap.norm(dim=1).mean() if form == "distance" else gap.square().mean()


def eager_map(x: Tensor, p: float = 2) -> Tensor:
    return F.normalize(x.abs().pow(p).mean(1).flatten(1))


@pytest.mark.parametrize("form", ["mean_square", "distance"])
@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["odd", "aligned"])
def test_every_power_and_form_is_at_most_twice_as_wrong_as_eager(
    impl: str, interpreted: bool, shape, layout, p, form
) -> None:
    """Against the cosine in float64, a formula written otherwise."""
    losses, grads = [], []
    for seed in range(2 if interpreted else 5):
        student, teacher = pair(shape, layout, seed, torch.float32)
        for kind in ("got", "eager", "truth"):
            wide = torch.float64 if kind == "truth" else torch.float32
            leaf = student.detach().to(wide).requires_grad_()
            if kind == "got":
                loss = attention_loss(leaf, teacher, p=p, form=form, impl=impl)
            elif kind == "eager":
                loss = eager_loss(leaf, teacher, p, form)
            else:
                loss = cosine_loss(leaf, teacher.to(wide), p, form)
            grads.append(torch.autograd.grad(7 * loss, leaf)[0])
            losses.append(loss.detach())
    for name, values in (("loss", losses), ("grad", grads)):
        got, eager, truth = (torch.stack(values[i::3]) for i in range(3))
        floor = torch.finfo(torch.float32).eps * rms(truth)
        factor = 4.0 if interpreted else 2.0
        assert_as_accurate(name, got, eager, truth, factor=factor, floor=floor)


@pytest.mark.parametrize("p", [1.5, 3])
def test_other_powers_run_on_the_reference(p: float) -> None:
    student, teacher = pair("odd", "nchw", 0, torch.float64)
    got = attention_loss(student, teacher, p=p)
    assert got.item() == pytest.approx(
        cosine_loss(student, teacher, p, "mean_square").item(), rel=1e-9
    )


# student, teacher: windows of 2x2, of 3x1 and 1x2 at once, and sizes that do not divide.
POOLED = {
    "even": ((3, 10, 16, 8), (3, 4, 8, 4)),
    "both": ((2, 3, 9, 5), (2, 19, 3, 10)),
    "uneven": ((2, 6, 7, 7), (2, 3, 4, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", POOLED)
def test_the_larger_map_is_pooled_to_the_smaller(impl, case, layout, dtype) -> None:
    for student_shape, teacher_shape in (POOLED[case], POOLED[case][::-1]):
        student, teacher = (
            features(shape, seed, dtype).to(memory_format=LAYOUTS[layout])
            for seed, shape in enumerate((student_shape, teacher_shape))
        )
        student.requires_grad_()
        size = tuple(min(a, b) for a, b in zip(student_shape[2:], teacher_shape[2:], strict=True))
        got = attention_loss(student, teacher, impl=impl)
        (grad,) = torch.autograd.grad(3 * got, student)
        found = attention_map(student, size=size, impl=impl)

        def plain(wide: torch.dtype, loss, student=student, teacher=teacher, size=size):
            leaf = student.detach().to(wide).requires_grad_()
            sides = [F.adaptive_avg_pool2d(x, size) for x in (leaf, teacher.to(wide))]
            value = loss(*sides, 2, "mean_square")
            (grad,) = torch.autograd.grad(3 * value, leaf)
            return value, grad, eager_map(sides[0].detach())

        _, eager_grad, eager = plain(torch.float32, eager_loss)
        want, true_grad, truth = plain(torch.float64, cosine_loss)
        assert got.item() == pytest.approx(want.item(), rel=2e-6)
        assert_as_accurate("grad", grad, eager_grad.to(dtype), true_grad)
        floor = torch.finfo(torch.float32).eps * rms(truth)
        assert_as_accurate("map", found, eager, truth, floor=floor)


@pytest.mark.parametrize("form", ["mean_square", "distance"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_equal_features_give_exactly_zero(impl: str, dtype, layout: str, form: str) -> None:
    student, _ = pair("odd", layout, 0, dtype)
    teacher = student.clone(memory_format=torch.preserve_format)
    student.requires_grad_()
    loss = attention_loss(student, teacher, form=form, impl=impl)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("scale", [0.0, 1e-8, 3e-7, 1e-5])
def test_maps_around_eps_are_those_of_normalize(impl: str, scale: float, p: int) -> None:
    """Below eps the divisor is eps: maps of nothing are 0, with gradients that are finite."""
    student, teacher = pair("odd", "nchw", 0, torch.float32)
    student = (student * (scale if p == 2 else scale**2)).requires_grad_()
    leaf = student.detach().double().requires_grad_()
    truth = F.normalize(leaf.abs().pow(p).mean(1).flatten(1))
    other = F.normalize(teacher.double().abs().pow(p).mean(1).flatten(1))
    found = attention_map(student, p=p, impl=impl)
    torch.testing.assert_close(found.double(), truth, rtol=2e-6, atol=0)
    up = torch.randn(found.shape)
    loss = attention_loss(student, teacher, p=p, impl=impl)
    want_loss = (truth - other).square().mean()
    assert loss.item() == pytest.approx(want_loss.item(), rel=2e-6)
    for got, want in (((up * found).sum(), (up * truth).sum()), (5 * loss, 5 * want_loss)):
        (grad,) = torch.autograd.grad(got, student, retain_graph=True)
        (want_grad,) = torch.autograd.grad(want, leaf, retain_graph=True)
        assert grad.isfinite().all()
        assert (grad - want_grad).norm() <= 2e-6 * want_grad.norm()
        if scale == 0:
            assert (grad == 0).all()


@pytest.mark.float64
@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(impl: str, layout: str, p: int) -> None:
    student = features((2, 3, 4, 6), 0).to(memory_format=LAYOUTS[layout])
    # Away from 0, where |x| has no derivative.
    student = (student + 0.1).requires_grad_()
    teacher = features((2, 4, 2, 3), 1)
    up = torch.randn(2, 6, dtype=torch.float64)
    for form in ("mean_square", "distance"):
        assert torch.autograd.gradcheck(
            lambda s, form=form: 2.5 * attention_loss(s, teacher, p=p, form=form, impl=impl),
            student,
        )
    assert torch.autograd.gradcheck(
        lambda s: up * attention_map(s, p=p, size=(2, 3), impl=impl), student
    )


@pytest.mark.float64
def test_second_derivatives(impl: str) -> None:
    student = features((2, 3, 2, 4), 0)
    student[0, 0, 0, 0] = 0  # where abs() would lose the curvature of the square
    student.requires_grad_()
    teacher = features((2, 2, 2, 2), 1)
    for form in ("mean_square", "distance"):
        assert torch.autograd.gradgradcheck(
            lambda s, form=form: attention_loss(s, teacher, form=form, impl=impl), student
        )
    assert torch.autograd.gradgradcheck(lambda s: attention_map(s, impl=impl), student)
