"""`attention_map` and its loss inside opcheck, torch.compile, torch.export, vmap and autocast."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from fastkd.kernels import attention_loss, attention_map, status

needs_cpp = pytest.mark.skipif(
    not status()["attention_map"]["cpu"].startswith("c++"),
    reason=status()["attention_map"]["reason"],
)


def pair(
    num: int = 4, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(num, 6, 4, 4), torch.randn(num, 9, 8, 8)
    return student.to(device, dtype), teacher.to(device, dtype)


@needs_cpp
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype, channels_last: bool, place: str) -> None:
    if place == "cuda" and dtype == torch.float64:
        pytest.skip("float64 takes the reference on a GPU")
    order = torch.channels_last if channels_last else torch.contiguous_format
    student, teacher = (x.to(memory_format=order) for x in pair(4, dtype, place))
    ops = torch.ops.fastkd
    torch.library.opcheck(ops._attention_energy.default, (teacher, 2, (2, 4)))
    wide = torch.promote_types(dtype, torch.float32)
    for upstream in (None, torch.tensor(3.0, device=place)):
        coefficients = torch.randn(4, 16, dtype=wide, device=place)
        args = (student, coefficients, upstream, 2, (1, 1))
        torch.library.opcheck(ops._attention_energy_grad.default, args)
    for distance in (False, True):
        args = (student, teacher, 4, (1, 1), (2, 2), 1e-12, distance)
        torch.library.opcheck(ops._attention_loss.default, args)


@pytest.mark.parametrize(
    ("which", "dtype"),
    [
        (None, torch.float32),
        ("reference", torch.bfloat16),
        pytest.param(None, torch.bfloat16, marks=pytest.mark.matrix),
        pytest.param("reference", torch.float32, marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_fullgraph_compile_gives_the_same_and_recompiles_at_most_once(which, dtype, place) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def both(s: Tensor, t: Tensor) -> Tensor:
        cubes = attention_map(s, size=(2, 4), impl=which).pow(3)
        return 3 * attention_loss(s, t, impl=which) + cubes.sum()

    compiled = torch.compile(both, fullgraph=True, backend=counter)
    for num in (8, 12, 5, 33):
        student, teacher = pair(num, dtype, place)
        student.requires_grad_()
        want, got = both(student, teacher), compiled(student, teacher)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(got, student)[0],
            torch.autograd.grad(want, student)[0],
            rtol=2e-2 if dtype == torch.bfloat16 else 1e-4,
            atol=1e-6,
        )
    assert counter.frame_count <= 2


@needs_cpp
@pytest.mark.matrix
def test_inductor_runs_the_ops(place: str) -> None:
    student, teacher = pair(device=place)
    student.requires_grad_()

    def total(s: Tensor) -> Tensor:
        return 2 * attention_loss(s, teacher) + attention_map(s).pow(3).sum()

    want = torch.autograd.grad(total(student), student)[0]
    got = torch.autograd.grad(torch.compile(total, fullgraph=True)(student), student)[0]
    torch.testing.assert_close(got, want)


class Both(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return attention_loss(student, teacher), attention_map(student)


def test_export_of_the_forward_pass() -> None:
    student, teacher = pair()
    dynamic = ({0: torch.export.Dim.DYNAMIC},) * 2
    program = torch.export.export(Both(), (student, teacher), dynamic_shapes=dynamic)
    for num in (4, 7):
        student, teacher = pair(num)
        for got, want in zip(
            program.module()(student, teacher), Both()(student, teacher), strict=True
        ):
            assert torch.equal(got, want)


def test_torch_func_transforms_run_on_the_reference() -> None:
    student, teacher = torch.randn(3, 4, 6, 4, 4), torch.randn(3, 4, 9, 4, 4)
    got = torch.vmap(attention_loss)(student, teacher)
    want = torch.stack([attention_loss(s, t) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(got, want)
    leaf = student[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(attention_loss(leaf, teacher[0]), leaf)
    transformed = torch.func.grad(lambda s: attention_loss(s, teacher[0]))(student[0])
    torch.testing.assert_close(transformed, grad)
    with pytest.raises(ValueError, match=r"cannot run under torch\.func"):
        torch.vmap(lambda s: attention_map(s, impl="cpp"))(student)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, place: str) -> None:
    net, images = nn.Conv2d(3, 6, 3, padding=1).to(place), torch.randn(4, 3, 4, 4, device=place)
    _, teacher = pair(device=place)
    with torch.autocast(place, dtype):
        features = net(images)
        assert features.dtype == dtype
        loss = attention_loss(features, teacher)
        reference = attention_loss(features, teacher, impl="reference")
        assert attention_map(features).dtype == torch.float32
    assert loss.dtype == reference.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    (65536 * loss).backward()
    assert net.weight.grad is not None
    assert net.weight.grad.dtype == torch.float32
    assert net.weight.grad.isfinite().all()
