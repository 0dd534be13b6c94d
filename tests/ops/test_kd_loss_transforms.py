"""`kd_loss` inside opcheck, torch.compile, torch.export, vmap, autocast and DDP."""

import copy
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd.kernels import kd_loss, kd_loss_mean, status
from fastkd.kernels.kd_loss.inputs import Inputs
from fastkd.losses import KDLoss

needs_cpp = pytest.mark.skipif(
    not status()["kd_loss"]["cpu"].startswith("c++"), reason=status()["kd_loss"]["reason"]
)


def inputs(n: int = 6, c: int = 40, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    student, teacher = (3 * torch.randn(2, n, c, device=device)).to(dtype)
    return student, teacher, torch.arange(n, device=device) % c


@needs_cpp
@pytest.mark.parametrize("shape", [(6, 40), (2, 5, 3, 4)], ids=str)
def test_opcheck(shape, place: str) -> None:
    student, teacher = torch.randn(2, *shape, device=place)
    rows = (shape[0], *shape[2:])
    labels = torch.zeros(rows, dtype=torch.long, device=place)
    weights, upstream = torch.rand(2, *rows, device=place)
    common = Inputs(student, [teacher], labels, 4.0, 0.1, -100, 1, weights, None)
    ops = torch.ops.fastkd
    torch.library.opcheck(ops._kd_loss.default, tuple(common))
    *_, stats = ops._kd_loss(*common)
    torch.library.opcheck(
        ops._kd_loss_grad.default, (*common, upstream, None, None, stats, 1.0, 1.0)
    )
    for with_grad in (True, False) if place == "cpu" else (False,):
        torch.library.opcheck(ops._kd_loss_mean.default, (*common, 0.9, 0.1, with_grad))


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

    def both(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows = kd_loss(s, t, y, impl=which)
        return 3 * kd_loss_mean(s, t, y, impl=which) + (rows.kd * rows.ce).sum()

    compiled = torch.compile(both, fullgraph=True, backend=counter)
    for n in (8, 12, 5, 33):
        student, teacher, labels = inputs(n, dtype=dtype, device=place)
        student.requires_grad_()
        want, got = both(student, teacher, labels), compiled(student, teacher, labels)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(got, student)[0],
            torch.autograd.grad(want, student)[0],
            rtol=2e-2 if dtype == torch.bfloat16 else 1e-4,
            atol=1e-6,
        )
    assert counter.frame_count <= 2


@needs_cpp
def test_inductor_runs_the_ops(place: str) -> None:
    student, teacher, labels = inputs(device=place)
    student.requires_grad_()
    compiled = torch.compile(lambda s: kd_loss_mean(s, teacher, labels) * 2, fullgraph=True)
    want = torch.autograd.grad(kd_loss_mean(student, teacher, labels) * 2, student)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(student), student)[0], want)


@pytest.mark.parametrize("loss", [KDLoss(), KDLoss(reduction="none")], ids=["mean", "none"])
def test_export_of_the_forward_pass(loss: KDLoss) -> None:
    student, teacher, labels = inputs()
    program = torch.export.export(loss, (student, teacher, labels))
    want = loss(student, teacher, labels)
    assert torch.equal(program.module()(student, teacher, labels), want)


def test_torch_func_transforms_run_on_the_reference() -> None:
    student, teacher = torch.randn(3, 4, 10), torch.randn(3, 4, 10)
    want = kd_loss(student, teacher).kd
    got = torch.vmap(lambda s, t: kd_loss(s, t).kd)(student, teacher)
    torch.testing.assert_close(got, want)
    leaf = student[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(kd_loss_mean(leaf, teacher[0]), leaf)
    transformed = torch.func.grad(lambda s: kd_loss_mean(s, teacher[0]))(student[0])
    torch.testing.assert_close(transformed, grad)
    with pytest.raises(ValueError, match="cannot run under"):
        torch.vmap(lambda s, t: kd_loss(s, t, impl="cpp").kd)(student, teacher)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, place: str) -> None:
    net, x = nn.Linear(8, 40, device=place), torch.randn(6, 8, device=place)
    _, teacher, labels = inputs(device=place)
    with torch.autocast(place, dtype):
        logits = net(x)
        assert logits.dtype == dtype
        loss = KDLoss()(logits, teacher, labels)
        reference = kd_loss_mean(logits, teacher, labels, impl="reference", class_dim=1)
    assert loss.dtype == reference.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    (65536 * loss).backward()
    assert net.weight.grad is not None
    assert net.weight.grad.dtype == torch.float32
    assert net.weight.grad.isfinite().all()


@needs_cpp
def test_whoever_records_calls_sees_the_ops() -> None:
    """In plain eager mode the C++ kernels are called without the dispatcher; nowhere else."""
    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    def run(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        leaf = student.detach().requires_grad_()
        rows = kd_loss(leaf, teacher, labels)
        loss = 3 * kd_loss_mean(leaf, teacher, labels) + (rows.kd * rows.ce).sum()
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    student, teacher, labels = inputs(dtype=torch.bfloat16)
    want = run(student, teacher, labels)
    assert seen == []
    with Recorder():
        got = run(student, teacher, labels)
    for op, calls in (("_kd_loss", 1), ("_kd_loss_mean", 1), ("_kd_loss_grad", 2)):
        assert seen.count(f"fastkd.{op}.default") == calls
    # A lazily negated view: what lies in memory is not its value.
    wide = student.float()
    negated = torch.complex(wide, -wide).conj().imag
    assert negated.is_neg()
    for results, plain in (
        (got, want),
        (run(negated, teacher, labels), run(wide, teacher, labels)),
    ):
        for a, b in zip(results, plain, strict=True):
            assert torch.equal(a, b)


RANK = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from fastkd.losses import KDLoss
rank, store, data, out = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
net, student, teacher, labels = torch.load(data, weights_only=False)
ddp = nn.parallel.DistributedDataParallel(net)
part = slice(4 * rank, 4 * rank + 4)
KDLoss()(ddp(student[part]), teacher[part], labels[part]).backward()
if rank == 0:
    torch.save(net.weight.grad, out)
dist.barrier()  # a rank that leaves early can take the other one down
dist.destroy_process_group()
os._exit(0)  # gloo aborts now and then while Python takes it apart
"""


def test_ddp_gradient_is_that_of_the_whole_batch(tmp_path) -> None:
    net, (student, teacher, labels) = nn.Linear(40, 40), inputs(8)
    store, data, out = (str(tmp_path / name) for name in ("store", "data.pt", "grad.pt"))
    torch.save((net, student, teacher, labels), data)
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), store, data, out])
        for rank in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    KDLoss()(net(student), teacher, labels).backward()
    torch.testing.assert_close(torch.load(out), net.weight.grad)


def test_loss_survives_a_deep_copy_of_its_module() -> None:
    student, teacher, labels = inputs()
    loss = KDLoss.preset("deit", temperature=2.0)
    assert torch.equal(
        copy.deepcopy(loss)(student, teacher, labels), loss(student, teacher, labels)
    )
