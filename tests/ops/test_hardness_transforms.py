"""`hardness` and `select_hardest` in opcheck, torch.compile, torch.export, vmap, CUDA graphs."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd.kernels import hardness, select_hardest, status

CRITERIA = ["kl", "teacher_entropy", "student_entropy", "cross_entropy", "margin"]
needs_cpp = pytest.mark.skipif(
    not status()["hardness"]["cpu"].startswith("c++"), reason=status()["hardness"]["reason"]
)


def inputs(n: int = 8, c: int = 40, dtype: torch.dtype = torch.float32, **options):
    student, teacher = (3 * torch.randn(2, n, c, **options)).to(dtype)
    return student, teacher, torch.arange(n, **options) % c


def pick(student: Tensor, teacher: Tensor, labels: Tensor, which=None) -> tuple[Tensor, ...]:
    """What a training step does with the ops: half of the pool by each criterion."""
    picked = []
    for criterion in CRITERIA:
        scores = hardness(student, teacher, labels, criterion=criterion, impl=which)
        index, num_nan, (rows,) = select_hardest(scores, ratio=0.5, gather=student, impl=which)
        picked += [scores, index, num_nan, rows]
    return *picked, select_hardest(scores, 4, impl=which).index


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype, place: str) -> None:
    if place == "cuda" and dtype == torch.float64:
        pytest.skip("float64 takes the reference on a GPU")
    student, teacher, labels = inputs(dtype=dtype, device=place)
    ops = torch.ops.fastkd
    torch.library.opcheck(ops._hardness.default, (student, teacher, None, "kl", 4.0))
    torch.library.opcheck(ops._hardness.default, (student, None, None, "entropy", 1.0))
    for criterion in ("cross_entropy", "margin"):
        torch.library.opcheck(ops._hardness.default, (student, None, labels, criterion, 1.0))
    torch.library.opcheck(
        ops._hardness.default, (student.requires_grad_(), None, None, "entropy", 1.0)
    )
    scores = torch.randn(9, dtype=dtype, device=place)
    torch.library.opcheck(ops._select_hardest.default, (scores, 4))


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
    compiled = torch.compile(pick, fullgraph=True, backend=counter)
    for n in (8, 12, 5, 33):
        arguments = inputs(n, dtype=dtype, device=place)
        for got, want in zip(compiled(*arguments, which), pick(*arguments, which), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


@needs_cpp
@pytest.mark.matrix
def test_inductor_runs_the_ops(place: str) -> None:
    arguments = inputs(device=place)
    compiled = torch.compile(pick, fullgraph=True)
    for got, want in zip(compiled(*arguments), pick(*arguments), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("which", "dynamic"),
    [pytest.param(None, True, marks=needs_cpp), ("reference", False)],
    ids=["op-any-rows", "reference"],
)
def test_export(which, dynamic: bool) -> None:
    class Pick(nn.Module):
        def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            return pick(student, teacher, labels, which)

    shapes = [{0: torch.export.Dim("rows", min=4, max=1000)}] * 3 if dynamic else None
    program = torch.export.export(Pick(), inputs(), dynamic_shapes=shapes)
    arguments = inputs(13 if dynamic else 8)
    for got, want in zip(program.module()(*arguments), pick(*arguments, which), strict=True):
        torch.testing.assert_close(got, want)


def test_vmap_runs_on_the_reference() -> None:
    student, teacher = torch.randn(2, 3, 8, 10)
    scores = torch.vmap(hardness)(student, teacher)
    torch.testing.assert_close(
        scores, torch.stack([hardness(*pair) for pair in zip(student, teacher, strict=True)])
    )
    index = torch.vmap(lambda x: select_hardest(x, 3).index)(scores)
    assert index.tolist() == [select_hardest(row, 3).index.tolist() for row in scores]
    with pytest.raises(ValueError, match="cannot run under"):
        torch.vmap(lambda s, t: hardness(s, t, impl="cpp"))(student, teacher)


def test_no_gradient_flows_through_scores() -> None:
    student, teacher, labels = inputs()
    student.requires_grad_()
    teacher.requires_grad_()
    for which in (None, "reference"):
        for criterion in CRITERIA:
            scores = hardness(student, teacher, labels, criterion=criterion, impl=which)
            assert not scores.requires_grad
            assert not torch.compile(hardness, backend="aot_eager")(
                student, teacher, labels, criterion=criterion, impl=which
            ).requires_grad


@needs_cpp
def test_whoever_records_or_rewrites_calls_sees_the_ops() -> None:
    """In plain eager mode the C++ kernels are called without the dispatcher; nowhere else."""
    student, teacher, labels = inputs()
    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    want = pick(student, teacher, labels)
    with Recorder():
        got = pick(student, teacher, labels)
    assert seen.count("fastkd._hardness.default") == 5
    assert seen.count("fastkd._select_hardest.default") == 6
    # A lazily negated view: what lies in memory is not its value.
    negated = torch.complex(student, -student).conj().imag
    assert negated.is_neg()
    for results in (got, pick(negated, teacher, labels)):
        for a, b in zip(results, want, strict=True):
            assert torch.equal(a, b)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (student, teacher, labels)]
        assert [x.shape for x in pick(*fakes)] == [x.shape for x in want]
    traced = torch.jit.trace(lambda s, t: hardness(s, t), (student, teacher))
    assert torch.equal(traced(teacher, student), hardness(teacher, student))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_scores_in_fp32(dtype: torch.dtype, place: str) -> None:
    student, teacher, _ = inputs(dtype=dtype, device=place)
    with torch.autocast(place, dtype):
        for which in (None, "reference"):
            scores = hardness(student, teacher, impl=which)
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, hardness(student.float(), teacher.float()))


@pytest.mark.parametrize("rows", [128, 4096])
@pytest.mark.parametrize("criterion", ["kl", "margin"])
def test_logits_to_indices_take_two_launches_and_nothing_else(monkeypatch, rows, criterion) -> None:
    pytest.importorskip("triton")
    from fastkd.kernels.hardness import gpu

    launched, others = [], []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            others.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(gpu, "launch", lambda kernel, *_, **__: launched.append(kernel))
    student, teacher, labels = inputs(rows, 100)
    with Recorder():
        if criterion == "kl":
            scores = gpu.hardness(student, teacher, None, "kl", 4.0)
        else:
            scores = gpu.hardness(student, None, labels, "margin", 4.0)
        gpu.select_hardest(scores, rows // 2)
    assert launched == [gpu.score_kernel, gpu.rank_kernel]
    assert set(others) == {"new_empty"}
