"""What a measurement of the planner computes, and what it leaves as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastkd.kernels import status
from fastkd.models import use_kernels
from fastkd.models.fused import choice
from fastkd.models.planner import BlockSpec, Case, Chooser
from fastkd.models.planner import measure as clock
from fastkd.models.planner.measure import Tensors, computing, fused, measure, plain
from fastkd.models.planner.spec import KINDS
from fastkd.models.planner.store import Store
from fastkd.testing import assert_as_accurate

CPU = torch.device("cpu")
INVERTED = BlockSpec(
    6, 6, groups=24, expand=24, before="relu6", activation="relu6", after="none", residual=True
)
SPECS = [
    BlockSpec(12, 20, groups=3),
    BlockSpec(12, 20, groups=12, stride=2, before="relu", after="relu"),
    BlockSpec(12, 12, groups=6, dilation=2, padding=2, after="relu", residual=True),
    replace(INVERTED, activate_sum=True, after="relu6"),
    INVERTED,
    replace(INVERTED, biases=True),
]
ids = pytest.mark.parametrize("spec", SPECS, ids=str)


def case_of(spec, **more) -> Case:
    return replace(Case(spec, (3, spec.in_channels, 7, 9), torch.float32, CPU, True, True), **more)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(clock, "BUDGET_S", 0.0)
    monkeypatch.setattr(clock, "FEWEST", 2)
    monkeypatch.setattr(clock, "_SHORTEST_S", 0.0)


@ids
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("live", [True, False])
def test_all_kinds_compute_the_same_block(spec, training, live):
    case = case_of(spec, training=training, batch_statistics=live)
    first, second = (Tensors.of(replace(case, channels_last=one)) for one in (False, True))
    third = Tensors.of(case)
    wide = Tensors.of(replace(case, dtype=torch.float64))
    with computing(case):
        exact = plain(spec, doubled(wide))
        eager = plain(spec, first)
        last = plain(spec, second)
        one = fused(spec, third)
    for name, got in (("channels-last", last), ("fused", one)):
        assert_as_accurate(name, got.detach(), eager.detach(), exact.detach())
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert eager.is_contiguous()
    assert torch.equal(third.norm.running_mean, torch.zeros(spec.channels)) != live


def doubled(given: Tensors) -> Tensors:
    def wide(x):
        return None if x is None else x.detach().double()

    def norm(one):
        names = ("weight", "bias", "running_mean", "running_var")
        return one and replace(one, **{name: wide(getattr(one, name)) for name in names})

    names = ("x_NCHW", "residual", "expand", "grouped", "pointwise")
    names += ("expand_bias", "grouped_bias", "pointwise_bias")
    norms = {name: norm(getattr(given, name)) for name in ("before", "norm", "after")}
    return replace(given, **{name: wide(getattr(given, name)) for name in names}, **norms)


@ids
def test_a_training_step_computes_every_gradient(spec):
    """All leaves are inputs of the graph, or autograd would refuse."""
    case = case_of(spec)
    given = Tensors.of(case)
    with computing(case):
        out = fused(spec, given)
        gradients = torch.autograd.grad(out, given.leaves(), torch.ones_like(out) / 7)
    assert all(gradient.isfinite().all() for gradient in gradients)
    norms = 1 + (spec.before is not None) + (spec.after is not None)
    weights = 2 + (spec.expand is not None)
    assert len(gradients) == 1 + spec.residual + weights * (1 + spec.biases) + 2 * norms


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_is_sampled_in_every_turn(training, channels_last, dtype, short):
    case = case_of(SPECS[1], training=training, channels_last=channels_last, dtype=dtype)
    seconds = measure(case)
    assert tuple(seconds) == KINDS
    assert {len(one) for one in seconds.values()} == {2}
    assert all(sample > 0 for one in seconds.values() for sample in one)


@pytest.mark.parametrize("outside", ["grad", "no_grad", "inference", "autocast"])
def test_nothing_outside_is_changed_by_a_measurement(outside, short):
    modes = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }

    def state():
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        )

    layer = torch.nn.Conv2d(6, 6, 3)
    drawn = torch.get_rng_state()
    with modes[outside]():
        before = state()
        measure(case_of(SPECS[0]))
        assert state() == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert layer.weight.grad is None


def test_the_numbers_do_not_depend_on_the_random_state():
    torch.manual_seed(1)
    first = Tensors.of(case_of(INVERTED)).leaves()
    torch.manual_seed(2)
    second = Tensors.of(case_of(INVERTED)).leaves()
    assert all(map(torch.equal, first, second))


@contextmanager
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "defaults", [double_by_default, lambda: torch.device("meta")], ids=["float64", "meta"]
)
def test_the_clock_follows_the_case_and_not_the_defaults_of_torch(defaults, short):
    case = case_of(INVERTED)
    expected = Tensors.of(case).leaves()
    with defaults():
        got = Tensors.of(case)
        measure(case)
    running = [got.norm.running_mean, got.norm.running_var]
    for one in (*got.leaves(), *running):
        assert (one.device, one.dtype) == (CPU, torch.float32)
    assert all(map(torch.equal, got.leaves(), expected))


def test_a_compiler_gets_a_measured_choice(monkeypatch, tmp_path, short):
    """As `fastkd.models.fused` asks: the answer is a constant of the graph."""
    monkeypatch.setenv("FASTKD_PLANNER", "measure")
    chooser = Chooser(store=lambda device: Store(device, tmp_path))
    case = case_of(SPECS[0])
    choices = []

    @torch.compiler.assume_constant_result
    def kind() -> str:
        choices.append(chooser.choose(case))
        return choices[-1].kind

    def double(x):
        return 2 * x if kind() in KINDS else x

    compiled = torch.compile(double, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert [choice.source for choice in choices] == ["measured"]


@pytest.mark.skipif(
    status()["grouped_pointwise"]["cpu"].startswith("reference"), reason="no C++ core"
)
def test_a_block_under_a_checkpoint_may_be_measured(monkeypatch, tmp_path, short):
    """Else the clock's backward pass would recompute the block, which asks for the clock."""
    monkeypatch.setenv("FASTKD_PLANNER", "measure")
    monkeypatch.setenv("FASTKD_CACHE", str(tmp_path))
    model = use_kernels(
        nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1, groups=3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 5, 1),
        )
    )
    asked = []

    def counted(case):
        asked.append(case)
        assert len(asked) < 3
        return measure(case)

    chooser = Chooser(counted)
    monkeypatch.setattr(choice, "CHOOSER", chooser)
    x_NCHW = torch.randn(2, 6, 5, 7, requires_grad=True)
    out = checkpoint(model, x_NCHW, use_reentrant=False)
    out.backward(torch.full_like(out, 0.3))
    gradient = x_NCHW.grad
    x_NCHW.grad = None
    use_kernels(model, "plain")(x_NCHW).backward(torch.full_like(out, 0.3))
    torch.testing.assert_close(gradient, x_NCHW.grad)
    assert len(asked) == 1


def test_hooks_on_saved_tensors_see_nothing_of_a_measurement(short):
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda _: None):
        measure(case_of(SPECS[0]))
    assert packed == []
    with torch.autograd.graph.disable_saved_tensors_hooks("forbidden"):
        assert set(measure(case_of(SPECS[0]))) == set(KINDS)
