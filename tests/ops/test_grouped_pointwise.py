"""`grouped_pointwise` against chains of plain modules in float64: outputs, statistics, gradients.

With TRITON_INTERPRET=1 the same tests run the Triton kernels on the CPU. The cases of the stages
are in grouped_pointwise_cases.py, the blocks in grouped_pointwise_modules.py.
"""

import copy
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from grouped_pointwise_cases import CASES, MATRIX, check_stage, crossed, dispatched
from grouped_pointwise_modules import FORMS, Block, Shape
from torch import Tensor

from fastkd.kernels.grouped_pointwise import reference
from fastkd.kernels.grouped_pointwise.op import STAGES
from fastkd.testing import assert_as_accurate, rms

EPS = torch.finfo(torch.float32).eps
SHAPES = [
    Shape("plain", 16, 4, 16),
    Shape("plain", 33, 33, 33, num=1, height=9, width=13),
    Shape("moonshine", 16, 1),
    Shape("moonshine", 24, 2, 40),
    Shape("moonshine", 32, 8, 32, stride=2),
    Shape("moonshine", 32, 16, 33, height=9, width=13),
    Shape("moonshine", 64, 4, 24, dilation=2),
    Shape("moonshine", 33, 11, 24, stride=2, height=9, width=13, num=1),
    Shape("moonshine", 96, 96, 24, dilation=16, height=17, width=5),
    Shape("moonshine", 100, 25, 36),
    Shape("inverted", 24, 24, 16, stride=2),
    Shape("inverted", 96, 96, 24),
    Shape("inverted", 576, 576, 96, height=5, width=5, num=1),
    Shape("preact", 40, 10, 40),
    Shape("preact", 16, 8, 33, stride=2, height=9, width=13),
    Shape("sum", 24, 8, 24),
    Shape("sum", 32, 32, 16, stride=2, dilation=2),
    Shape("linear", 40, 4, 40),
]
WIDTHS = (16, 24, 33, 40, 100, 128, 512, 576)
# (stride, dilation)
WALKS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 16), (2, 16)]
SHAPES_MATRIX = [
    Shape(
        form=sorted(FORMS)[index % len(FORMS)],
        channels=channels,
        groups=groups,
        out=(16, 24, 33, 64, 100)[index % 5],
        stride=stride,
        dilation=dilation,
        height=9 if index % 2 else 7,
        width=13 if index % 2 else 5,
        num=1 if index % 3 == 0 else 3,
    )
    for index, channels, groups, (stride, dilation) in crossed(WIDTHS, WALKS)
]
matrix = pytest.mark.matrix
ALL_SHAPES = [*SHAPES, *(pytest.param(shape, marks=matrix) for shape in SHAPES_MATRIX)]


def test_every_walk_is_made_in_wide_blocks_too() -> None:
    for cases, walks in ((MATRIX, 7), (SHAPES_MATRIX, 6)):
        facts = [
            (one.stride, one.dilation, getattr(one, "dtype", None))
            for one in cases
            if one.channels >= 100
        ]
        assert len(set(facts)) == walks
        assert min(map(facts.count, facts)) >= 4


@pytest.mark.usefixtures("needs_cpp")
@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=matrix) for case in MATRIX)], ids=str
)
def test_stages(case) -> None:
    for name in STAGES:
        check_stage(dispatched, name, case)


def settled(block: Block, first: int = 0) -> tuple[int, Tensor, Tensor | None]:
    """(seed, x, residual): the first draw on which no activation reads a value at a kink.

    There the gradient jumps, and rounding decides to which side: then eager and the op are both
    wrong, each at elements of its own.
    """
    truth = copy.deepcopy(block).double()
    for seed in count(first):
        x, residual = block.draw(seed)
        seen: list[tuple[str, Tensor]] = []
        with torch.no_grad():
            copy.deepcopy(truth)(x.double(), _double(residual), seen)
        gaps = [value.abs().min() for _, value in seen]
        gaps += [(value - 6).abs().min() / 2 for name, value in seen if name == "relu6"]
        if not gaps or min(gaps) > 1e-5:
            return seed, x, residual
    raise AssertionError


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def outcome(block: Block, x: Tensor, residual: Tensor | None, way: str | None) -> dict[str, Tensor]:
    """Output, running statistics and every gradient; `way` is "modules" or an impl."""
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    out = block(x, residual) if way == "modules" else block.fused(x, residual, impl=way)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(upstream.to(out.dtype))
    found = {"output": out, "x": x.grad, **dict(block.named_buffers())}
    if residual is not None:
        found["residual"] = residual.grad
    found |= {f"gradient of {name}": p.grad for name, p in block.named_parameters()}
    return {key: value.detach() for key, value in found.items() if "num_batches" not in key}


def check_outcome(
    got: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor], ulps: float
) -> None:
    """The op against float64, with twice the error of the modules in the same precision."""
    assert got.keys() == truth.keys()
    for name, value in truth.items():
        # Sums in another order may be off where eager's are exact by luck. The gradient of a bias
        # in front of a norm is a sum that cancels to 0: its terms are the size of the weights'.
        scale = rms(value)
        if name.endswith(".bias"):
            scale = max(scale, rms(truth[name.removesuffix("bias") + "weight"]))
        assert_as_accurate(name, got[name], eager[name], value, floor=ulps * EPS * scale)


def check_chain(block: Block, way: str) -> None:
    """Over five draws: a single one may favour either side."""
    seed, draws = -1, []
    for _ in range(5):
        seed, x, residual = settled(block, seed + 1)
        found = [outcome(copy.deepcopy(block), x, residual, name) for name in (way, "modules")]
        truth = copy.deepcopy(block).double()
        draws.append([*found, outcome(truth, x.double(), _double(residual), "modules")])
    check_outcome(*joined(draws), ulps=6)


def joined(draws: list[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """The results of several draws as one, for each way."""
    return [
        {name: torch.stack([draw[way][name] for draw in draws]) for name in draws[0][way]}
        for way in range(3)
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_is_as_accurate_as_plain_modules(impl, shape) -> None:
    check_chain(Block(shape), impl)


@matrix
@pytest.mark.parametrize("shape", SHAPES_MATRIX, ids=str)
def test_training_on_every_shape(fast, shape) -> None:
    check_chain(Block(shape), fast)


@pytest.mark.parametrize("shape", ALL_SHAPES[1::4], ids=str)
def test_frozen_statistics(fast, shape) -> None:
    check_chain(Block(shape).eval(), fast)


@pytest.mark.parametrize("shape", ALL_SHAPES[0::4], ids=str)
def test_recomputing_changes_no_bit(fast, shape) -> None:
    block = Block(shape)
    x, residual = block.draw()
    kept = outcome(copy.deepcopy(block), x, residual, fast)
    block.how["recompute"] = "on"
    again = outcome(copy.deepcopy(block), x, residual, fast)
    assert all(torch.equal(again[name], value) for name, value in kept.items())


def outcomes_in(dtype: torch.dtype, block: Block, way: str, seed: int = 0) -> list:
    """Of the op, of the modules under the same autocast, and in float64."""
    x, residual = (None if t is None else t.to(dtype) for t in block.draw(seed))
    with torch.autocast("cpu", dtype):
        found = [outcome(copy.deepcopy(block), x, residual, name) for name in (way, "modules")]
    truth = copy.deepcopy(block).double()
    return [*found, outcome(truth, x.double(), _double(residual), "modules")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ALL_SHAPES[2::4], ids=str)
def test_autocast_without_kinks_is_as_accurate_as_plain_modules(fast, shape, dtype) -> None:
    """In 16 bits some values are always rounded to the other side of a kink: here are none."""
    form = FORMS[shape.form]
    smooth = {name: "none" for name in ("before", "norm", "after") if getattr(form, name)}
    block = Block(shape, form=replace(form, **smooth))
    draws = [outcomes_in(dtype, block, fast, seed) for seed in range(5)]
    check_outcome(*joined(draws), ulps=torch.finfo(dtype).eps / EPS / 4)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_is_as_accurate_as_plain_modules(fast, form) -> None:
    """Over several draws, as few elements at the kinks make up most of the error."""
    block = Block(Shape(form, 24, 6, 24))
    draws = [outcomes_in(torch.bfloat16, block, fast, seed) for seed in range(12)]
    check_outcome(*joined(draws), ulps=torch.finfo(torch.bfloat16).eps / EPS / 4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", ALL_SHAPES[::2], ids=str)
def test_without_gradient(fast, shape, training) -> None:
    block = Block(shape).train(training)
    truth, (x, residual) = copy.deepcopy(block).double(), block.draw()
    with torch.no_grad():
        eager = copy.deepcopy(block)(x, residual)
        got = copy.deepcopy(block).fused(x, residual, impl=fast)
        want = truth(x.double(), _double(residual))
    assert_as_accurate("output", got, eager, want, floor=2 * EPS * rms(want))


@pytest.mark.usefixtures("needs_cpp")
@pytest.mark.parametrize("shape", ALL_SHAPES[3::5], ids=str)
def test_results_depend_neither_on_threads_nor_on_the_run(shape) -> None:
    block, before = Block(shape), torch.get_num_threads()
    x, residual = block.draw()
    try:
        runs = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            runs.append(outcome(copy.deepcopy(block), x, residual, None))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(run[name], value) for name, value in runs[0].items())


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
def test_running_statistics_are_those_of_batch_norm(impl, momentum) -> None:
    """Unbiased variance, weighted by the momentum; three batches one after the other."""
    block = Block(Shape(channels=24, groups=8))
    for norm in block.norms():
        norm.momentum = momentum
    plain = copy.deepcopy(block).double()
    for seed in range(3):
        x, _ = block.draw(seed)
        block.fused(x, impl=impl)
        plain(x.double())
    for name, buffer in plain.named_buffers():
        if "running" in name:
            got = block.get_buffer(name).double()
            torch.testing.assert_close(got, buffer, rtol=1e-5, atol=1e-6)


def test_large_means_cost_no_digits(fast) -> None:
    """A bias of 1000 standard deviations: sums of squares about 0 would lose the variance."""
    block = Block(Shape("sum", 32, 8, 32))
    with torch.no_grad():
        block.grouped.bias.add_(1000)
        block.norm.running_mean.zero_()
    truth, x, residual = copy.deepcopy(block).double(), *block.draw()
    want = truth(x.double(), _double(residual))
    got = block.fused(x, residual, impl=fast)
    # y of 1000 has a unit in the last place of 6e-5, which the norm multiplies by some 2.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-3)


def test_second_derivative(impl) -> None:
    block = Block(Shape("inverted", 12, 4, 10)).double()
    x, residual = (t.double() for t in block.draw())

    def penalty(way: str) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        net = copy.deepcopy(block)
        out = net(leaf, residual) if way == "modules" else net.fused(leaf, residual, impl=way)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), [leaf, *net.parameters()]))

    for got, want in zip(penalty(None), penalty("modules"), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shared", ["residual", "norms"])
def test_second_derivative_where_one_tensor_is_two_inputs(fast, shared) -> None:
    block = Block(Shape("sum", 12, 4, 12))
    if shared == "norms":
        block.after.weight = block.norm.weight
    x = block.draw()[0].contiguous(memory_format=torch.channels_last)

    def penalty(net: Block, leaf: Tensor, **how: Any) -> list[Tensor]:
        y = leaf * 1
        residual = y if shared == "residual" else y.tanh()
        out = net.fused(y, residual, **how) if how else net(y, residual)
        inputs = [leaf, *net.parameters()]
        first = torch.autograd.grad((out**3).mean(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return [*first, *second]

    truth = penalty(copy.deepcopy(block).double(), x.double().requires_grad_())
    for got, want in zip(penalty(block, x.requires_grad_(), impl=fast), truth, strict=True):
        assert (got - want).norm() <= 1e-3 * want.norm() + 1e-5


def test_stages_of_the_reference_hold_their_own_cases() -> None:
    for case in CASES[:6]:
        for name in STAGES:
            check_stage(reference, name, case)
