"""`grouped_pointwise` under opcheck, compile, export, checkpointing, DDP and torch.func."""

import copy

import pytest
import torch
import torch._dynamo.testing
from grouped_pointwise_cases import Case, dispatched, make_arguments
from grouped_pointwise_modules import FORMS, Block, Fused, Shape
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastkd.kernels.grouped_pointwise.op import STAGES


@pytest.mark.usefixtures("needs_cpp")
@pytest.mark.parametrize(
    "case",
    [
        Case(channels=12, out=10, bias=True, residual=True),
        Case(channels=12, out=10, norm=False, after=False, stride=2, dtype=torch.bfloat16),
        Case(channels=12, out=10, needs="input", activate_sum=True, residual=True),
        Case(channels=12, out=10, needs="weights", statistics=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", STAGES)
def test_opcheck(name: str, case: Case) -> None:
    torch.library.opcheck(getattr(dispatched, name), tuple(make_arguments(name, case)))


def step(net: torch.nn.Module, x: Tensor, residual: Tensor | None) -> list[Tensor]:
    """Output, gradients and running statistics of a training step."""
    leaf = x.detach().requires_grad_()
    net.zero_grad()
    out = net(leaf, residual)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(upstream.to(out.dtype))
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    return [t.detach().clone() for t in (out, leaf.grad, *grads, *net.buffers())]


def assert_alike(got: list[Tensor], want: list[Tensor], tolerance: float = 0.0) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("form", "which"),
    [("inverted", None), ("sum", None), ("preact", "reference")]
    + [
        pytest.param(form, which, marks=pytest.mark.matrix)
        for form in FORMS
        for which in (None, "reference")
    ],
)
def test_fullgraph_compile_gives_the_same_and_recompiles_at_most_once(form, which) -> None:
    net = Fused(Block(Shape(form, 12, 4, 10), impl=which))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend=counter)
    for num in (4, 6, 3):
        net.block.shape = Shape(form, 12, 4, 10, num=num)
        x, residual = net.block.draw(num)
        assert_alike(step(compiled, x, residual), step(net, x, residual), 1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("training", [True, False])
def test_compile_under_autocast(training) -> None:
    net = Fused(Block(Shape("moonshine", 12, 4, 10))).train(training)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    x, _ = net.block.draw()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = step(compiled, x, None), step(net, x, None)
    assert got[0].dtype == torch.bfloat16
    assert_alike(got, want, 1e-5)


@pytest.mark.usefixtures("needs_cpp")
@pytest.mark.matrix
def test_inductor_runs_the_ops() -> None:
    net = Fused(Block(Shape("inverted", 24, 8, 10)))
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True)
    x, residual = net.block.draw()
    assert_alike(step(compiled, x, residual), step(net, x, residual), 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_export_of_the_inference_form(form) -> None:
    net = Fused(Block(Shape(form, 12, 4, 10))).eval()
    x, residual = net.block.draw()
    given = (x,) if residual is None else (x, residual)
    dynamic = ({0: torch.export.Dim.DYNAMIC},) * len(given)
    program = torch.export.export(net, given, dynamic_shapes=dynamic)
    for num in (3, 5):
        given = tuple(torch.randn(num, *t.shape[1:]) for t in given)
        with torch.no_grad():
            assert torch.equal(program.module()(*given), net(*given))


@pytest.mark.usefixtures("needs_cpp")
def test_exported_block_is_one_stage() -> None:
    net = Fused(Block(Shape("moonshine", 12, 4, 10))).eval()
    program = torch.export.export(net, (net.block.draw()[0],))
    names = [str(n.target) for n in program.graph.nodes if "fastkd" in str(n.target)]
    assert names == ["fastkd._block_pair.default"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same(impl, reentrant) -> None:
    """Running statistics move twice, as those of plain modules do."""
    net = Fused(Block(Shape("inverted", 24, 8, 10), impl=impl))
    x, residual = net.block.draw()
    twin = copy.deepcopy(net)
    want = step(net, x, residual)
    leaf = x.detach().requires_grad_()
    out = checkpoint(twin, leaf, residual, use_reentrant=reentrant)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(upstream)
    got = [out.detach(), leaf.grad, *(p.grad for p in twin.parameters())]
    assert_alike(got, want[: len(got)])


def test_one_block_used_twice_in_a_graph(impl) -> None:
    block = Block(Shape("linear", 12, 4, 12))
    plain = copy.deepcopy(block).double()
    x, residual = block.draw()
    for net, way in ((block, impl), (plain, None)):
        run = net if way is None else lambda *args: block.fused(*args, impl=impl)
        wide = [t.double() if way is None else t for t in (x, residual)]
        run(run(*wide), wide[1]).square().sum().backward()
    for (name, got), (_, want) in zip(
        block.named_parameters(), plain.named_parameters(), strict=True
    ):
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-3, atol=1e-3, msg=name)
    for name, want in plain.named_buffers():
        if "running" in name:
            got = block.get_buffer(name).double()
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_torch_func_transforms_run_on_the_reference() -> None:
    block = Block(Shape("moonshine", 8, 4, 8)).eval()
    images = torch.randn(3, 2, 8, 5, 5)
    with torch.no_grad():
        got = torch.vmap(block.fused)(images)
        want = torch.stack([block.fused(x) for x in images])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    leaf = images[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(block.fused(leaf).square().sum(), leaf)
    transformed = torch.func.grad(lambda x: block.fused(x).square().sum())(images[0])
    torch.testing.assert_close(transformed, grad, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"cannot run under torch\.func"):
        torch.vmap(lambda x: block.fused(x, impl="cpp"))(images)


@pytest.mark.usefixtures("needs_cpp")
def test_whoever_records_or_rewrites_calls_sees_the_ops() -> None:
    """In plain eager mode the C++ stages are called without the dispatcher; nowhere else."""
    net = Fused(Block(Shape("sum", 12, 4, 12)))
    x, residual = net.block.draw()
    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    want = step(copy.deepcopy(net), x, residual)
    with Recorder():
        got = step(copy.deepcopy(net), x, residual)
    assert_alike(got, want)
    stages = [name.split("_block_")[1] for name in seen if "fastkd._block_" in name]
    forward = ["grouped", "pointwise", "normalise"]
    assert stages == [
        f"{name}.default" for name in forward + [f"{name}_backward" for name in forward[::-1]]
    ]
    # A lazily negated view: what lies in memory is not its value.
    negated = torch.complex(x, -x).conj().imag
    assert negated.is_neg()
    assert_alike(step(copy.deepcopy(net), negated, residual), want)
    with FakeTensorMode():
        fake = Fused(Block(Shape("sum", 12, 4, 12)))
        shapes = [value.shape for value in step(fake, *fake.block.draw())]
    assert shapes == [value.shape for value in want]


def test_two_ranks_train_as_one_process_on_the_whole_batch(ranks, tmp_path) -> None:
    """DDP with SyncBN, uneven batches; gradients, statistics and inputs' gradients."""
    ranks(2, "block_ranks.py", tmp_path)
    found = torch.load(tmp_path / "found.pt")
    for name, (got, want) in found.items():
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m)
