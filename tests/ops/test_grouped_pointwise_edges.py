"""`grouped_pointwise` at the edges: layouts, what needs a gradient, what is kept, wrong input."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grouped_pointwise_modules import FORMS, Block, Shape, described
from torch import Tensor

from fastkd.kernels import Norm, grouped_pointwise


def arranged(x: Tensor) -> list[Tensor]:
    """The same values in memory of different order, with NaN wherever nothing should be read."""
    num, channels, height, width = x.shape
    inside = torch.full((num, channels + 3, height, 2 * width), math.nan)
    inside[:, 1:-2, :, ::2] = x
    return [
        x.contiguous(),
        x.contiguous(memory_format=torch.channels_last),
        inside[:, 1:-2, :, ::2],
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ]


def test_memory_order_does_not_matter(impl) -> None:
    block = Block(Shape("sum", 12, 4, 10))
    x, residual = block.draw()
    results = []
    for given, added in zip(arranged(x), arranged(residual), strict=True):
        net = copy.deepcopy(block)
        leaf = given.detach().requires_grad_()
        out = net.fused(leaf, added, impl=impl)
        out.square().sum().backward()
        results.append([out.detach(), leaf.grad, *(p.grad for p in net.parameters())])
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_an_expanded_input_is_read_as_its_values(impl) -> None:
    block = Block(Shape("plain", 8, 4, 8)).eval()
    x = torch.randn(1, 8, 1, 1).expand(2, 8, 5, 6)
    torch.testing.assert_close(block.fused(x, impl=impl), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("form", "training"), [("sum", True), ("inverted", True), ("sum", False)])
def test_each_gradient_is_the_same_when_nothing_else_needs_one(fast, form, training) -> None:
    block = Block(Shape(form, 12, 4, 10)).train(training)
    x, residual = (t.requires_grad_() for t in block.draw())
    leaves = {"x": x, "residual": residual, **dict(block.named_parameters())}
    upstream = torch.randn_like(residual)
    all_grads = torch.autograd.grad(
        block.fused(x, residual, impl=fast), list(leaves.values()), upstream
    )
    for (name, leaf), want in zip(leaves.items(), all_grads, strict=True):
        for other in leaves.values():
            other.requires_grad_(other is leaf)
        out = block.fused(x, residual, impl=fast)
        (got,) = torch.autograd.grad(out, leaf, upstream)
        assert torch.equal(got, want), name


def kept_bytes(block: Block, x: Tensor, way: str, **how: Any) -> int:
    """What a training step keeps for its backward pass, without parameters and the input."""
    known = {p.untyped_storage().data_ptr() for p in [*block.parameters(), *block.buffers(), x]}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = block(x) if way == "modules" else block.fused(x, impl=way, **how)
    assert out.requires_grad
    return sum(sizes.values())


def test_recompute_keeps_little(fast) -> None:
    """Modules keep both convolutions' outputs and both ReLUs'; the last is the next block's x."""
    block = Block(Shape("moonshine", 32, 8, 32, height=16, width=16, num=4))
    x = block.draw()[0].contiguous(memory_format=torch.channels_last)
    tensor, small = x.numel() * 4, 32 * 64 * 4
    modules = kept_bytes(copy.deepcopy(block), x, "modules")
    assert 4 * tensor <= modules <= 4 * tensor + small
    assert 2 * tensor <= kept_bytes(copy.deepcopy(block), x, fast) <= 2 * tensor + small
    recomputed = kept_bytes(copy.deepcopy(block), x, fast, recompute="on")
    assert tensor <= recomputed <= tensor + small
    assert recomputed + tensor <= 0.6 * modules


def test_two_backward_passes_through_one_graph_give_the_same(fast) -> None:
    block = Block(Shape("inverted", 24, 8, 16))
    x, residual = block.draw()
    out = block.fused(x.requires_grad_(), residual, impl=fast)
    leaves = [x, *block.parameters()]
    first = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_changed_weight_is_an_error_and_not_a_wrong_gradient(fast) -> None:
    block = Block(Shape("plain", 8, 4, 8))
    out = block.fused(block.draw()[0], impl=fast)
    with torch.no_grad():
        block.pointwise.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_batch_without_images(impl) -> None:
    block = Block(Shape("sum", 8, 4, 6)).eval()
    x, residual = (t[:0] for t in block.draw())
    out = block.fused(x.requires_grad_(), residual, impl=impl)
    assert out.shape == (0, 6, 7, 5)
    out.sum().backward()
    assert x.grad is not None
    with pytest.raises(ValueError, match="`norm` is in training mode and has 0 values per channel"):
        block.train().fused(x, residual, impl=impl)


def test_nan_stays_nan(impl) -> None:
    block = Block(Shape("moonshine", 8, 4, 8))
    x, _ = block.draw()
    x[0, 0, 0, 0] = math.nan
    assert block.fused(x, impl=impl).isnan().any()


def vectors(channels: int = 8, **how: Any) -> Norm:
    words = {"running_mean": torch.zeros(channels), "running_var": torch.ones(channels)} | how
    return Norm(torch.ones(channels), torch.zeros(channels), **words)


GOOD: dict[str, Any] = {
    "x_NCHW": torch.randn(2, 8, 5, 5),
    "grouped_weight": torch.randn(8, 2, 3, 3),
    "pointwise_weight": torch.randn(6, 8, 1, 1),
    "norm": vectors(),
    "groups": 4,
}
BAD = {
    "groups": ({"groups": 3}, r"not a multiple of groups=3; expected \[C, C / groups, 3, 3\]"),
    "groups of weight": ({"groups": 2}, r"grouped_weight is \[8, 2, 3, 3\]; expected \[8, 4, 3, 3"),
    "no groups": ({"groups": 0}, "stride, dilation and groups of at least 1"),
    "stride": ({"stride": 0}, "stride, dilation and groups of at least 1"),
    "no pixel": ({"padding": 0, "dilation": 3}, r"images of \[5, 5\] leave no pixel"),
    "flat": (
        {"x_NCHW": torch.randn(8, 5)},
        r"x is \[8, 5\] torch.float32; expected \[N, C, H, W\]",
    ),
    "integers": ({"x_NCHW": torch.ones(2, 8, 5, 5, dtype=torch.int64)}, "x is .* torch.int64"),
    "channels": ({"x_NCHW": torch.randn(2, 4, 5, 5)}, "for the 4 channels in front of it"),
    "pointwise": (
        {"pointwise_weight": torch.randn(6, 4, 1, 1)},
        r"pointwise_weight is \[6, 4, 1, 1\]; expected \[CO, 8, 1, 1\]",
    ),
    "expand": (
        {"expand_weight": torch.randn(8, 3, 1, 1)},
        r"expand_weight is \[8, 3, 1, 1\]; expected \[CO, 8, 1, 1\]",
    ),
    "expand_bias": ({"expand_bias": torch.ones(8)}, "expand_bias without expand_weight"),
    "bias": ({"grouped_bias": torch.ones(6)}, r"grouped_bias is \[6\]; expected \[8\]"),
    "dtype": (
        {"pointwise_weight": torch.randn(6, 8, 1, 1).double()},
        "pointwise_weight is torch.float64 and x torch.float32; expected x's dtype",
    ),
    "half weights": (
        {"grouped_weight": torch.randn(8, 2, 3, 3).half()},
        "grouped_weight is torch.float16 and x torch.float32",
    ),
    "device": (
        {"pointwise_weight": torch.randn(6, 8, 1, 1, device="meta")},
        "pointwise_weight is on meta and x on cpu; move one",
    ),
    "norm's device": (
        {"norm": vectors(running_var=torch.ones(8, device="meta"))},
        "running_var of",
    ),
    "norm": ({"norm": vectors(6)}, r"weight of `norm` is \[6\]; expected \[8\]"),
    "before": ({"before": vectors(9)}, r"weight of `before` is \[9\]; expected \[8\]"),
    "after": ({"after": vectors(8)}, r"weight of `after` is \[8\]; expected \[6\]"),
    "activation": ({"norm": vectors(activation="gelu")}, "'gelu' is none of none, relu, relu6"),
    "eval": (
        {"norm": vectors(training=False, running_mean=None)},
        "`norm` has training=False and no running statistics",
    ),
    "one value": (
        {"x_NCHW": torch.randn(1, 8, 1, 1)},
        "`norm` is in training mode and has 1 values per channel; expected at least 2",
    ),
    "no value beside those of other ranks": (
        {
            "x_NCHW": torch.randn(0, 8, 5, 5),
            "norm": vectors(gather=torch.atleast_2d),
        },
        "`norm` is in training mode and has 0 values per channel; expected at least 1",
    ),
    "one value behind a stride": (
        {"x_NCHW": torch.randn(1, 8, 2, 2), "stride": 2},
        "`norm` is in training mode and has 1 values per channel",
    ),
    "residual": (
        {"residual": torch.randn(2, 8, 5, 5)},
        r"residual is \[2, 8, 5, 5\]; expected the shape of the result, \[2, 6, 5, 5\]",
    ),
    "residual's dtype": (
        {"residual": torch.randn(2, 6, 5, 5).bfloat16()},
        "residual is torch.bfloat16 and x torch.float32",
    ),
    "activate_sum": ({"activate_sum": True}, "activate_sum=True without `after`"),
    "recompute": ({"recompute": "always"}, "recompute='always' is none of auto, on, off"),
    "impl": ({"impl": "cuda"}, "impl='cuda' is not one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_sentence(name: str) -> None:
    words, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        grouped_pointwise(**(GOOD | words))
    assert "\n" not in str(error.value)


def test_good_input_of_these_tests_is_good() -> None:
    assert grouped_pointwise(**GOOD).shape == (2, 6, 5, 5)


@pytest.mark.usefixtures("needs_cpp")
def test_float64_takes_the_reference() -> None:
    block = Block(Shape("moonshine", 8, 4, 8)).double()
    x = block.draw()[0].double()
    assert torch.equal(block.fused(x), copy.deepcopy(block)(x))
    with pytest.raises(ValueError, match="impl='cpp' takes fp32, bf16 and fp16, not fp64"):
        block.fused(x, impl="cpp")


def test_a_norm_without_weight_bias_and_running_statistics(impl) -> None:
    block = Block(Shape("plain", 8, 4, 8))
    x, _ = block.draw()
    plain = torch.nn.BatchNorm2d(8, affine=False, track_running_stats=False)
    norm = Norm(None, None, eps=plain.eps)
    block.norm = plain
    want = block(x)
    got = block.fused(x, norm=norm, impl=impl)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_vectors_may_be_columns_or_one_number_expanded(impl, training) -> None:
    block = Block(Shape("plain", 8, 4, 8))
    x, _ = block.draw()
    columns = torch.rand(8, 5) + 0.5
    expanded = torch.full((1,), 1.5).expand(8)

    def computed(laid_out: Callable[[Tensor], Tensor]) -> Tensor:
        running_mean, running_var, *rest = map(laid_out, columns.clone().unbind(1))
        one = laid_out(expanded)
        return block.fused(
            x,
            norm=Norm(one, rest[0], running_mean, running_var, training),
            before=Norm(rest[1], one, rest[2], rest[2], training=False),
            grouped_bias=rest[0],
            pointwise_bias=one,
            impl=impl,
        )

    torch.testing.assert_close(computed(lambda vector: vector), computed(torch.Tensor.contiguous))


def test_weights_may_be_fp32_beside_16_bits_and_their_gradients_stay_so(impl) -> None:
    block = Block(Shape("moonshine", 8, 4, 8))
    x = block.draw()[0].bfloat16().requires_grad_()
    out = block.fused(x, impl=impl)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


def test_a_model_of_16_bits(impl) -> None:
    block = Block(Shape("inverted", 24, 4, 8)).bfloat16()
    x, residual = (t.bfloat16() for t in block.draw())
    out = block.fused(x, residual, impl=impl)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in block.parameters())
    assert all(not b.is_floating_point() or b.isfinite().all() for b in block.buffers())


def gather_of_two(vector: Tensor) -> Tensor:
    """As if another rank had the same batch."""
    return torch.stack([vector, vector])


@pytest.mark.parametrize("form", FORMS)
def test_equal_batches_on_two_ranks_give_what_one_gives(impl, form) -> None:
    """Statistics and the sums of the backward pass are those of all ranks."""
    block = Block(Shape(form, 12, 4, 10))
    x, residual = block.draw()
    norms = {
        name: described(getattr(block, name), getattr(block.form, name), gather=gather_of_two)
        for name in ("before", "norm", "after")
    }
    outs = []
    for how in ({}, norms):
        leaf = x.detach().requires_grad_()
        out = block.fused(leaf, residual, impl=impl, **how)
        leaves = [leaf, *block.parameters()]
        outs.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for got, want in zip(*outs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["moonshine", "preact"])
def test_infinite_inputs_get_the_gradient_of_plain_modules(fast, form) -> None:
    """With running statistics an infinite value is only a mask."""
    block = Block(Shape(form, 16, 16, 16)).eval()
    x, residual = block.draw()
    x[0, 3, 2, 2], x[0, 5, 4, 1] = math.inf, -math.inf
    gradients = []
    for way in ("modules", fast):
        leaf = x.detach().requires_grad_()
        how = block(leaf, residual) if way == "modules" else block.fused(leaf, residual, impl=way)
        how[:, :, :, 3:].sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5, equal_nan=True)
