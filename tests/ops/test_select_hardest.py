"""`select_hardest` against Python's own sort, ties and NaN included.

With TRITON_INTERPRET=1 the same tests run the Triton kernel on the CPU, see test_triton.py.
"""

import math

import pytest
import torch
from torch import Tensor

from fastkd.kernels import hardness, select_hardest


def hardest(scores: Tensor, k: int) -> list[int]:
    """Descending, ties to the lower index, NaN last."""
    values = scores.tolist()
    # In a comparison NaN is neither above nor below anything: those are placed by themselves.
    numbers = [i for i, value in enumerate(values) if not math.isnan(value)]
    rest = [i for i, value in enumerate(values) if math.isnan(value)]
    return (sorted(numbers, key=lambda i: (-values[i], i)) + rest)[:k]


def awkward(size: int, dtype: torch.dtype) -> Tensor:
    """Many ties, both zeros, both infinities, NaN of both signs, the smallest numbers."""
    scores = torch.randint(-4, 5, (size,)).to(dtype)
    # Triton's interpreter takes subnormal bf16 numbers for 0.
    tiny = torch.finfo(dtype).tiny / (1 if dtype == torch.bfloat16 else 2)
    nan, inf = math.nan, math.inf
    special = [nan, -nan, inf, -inf, 0.0, -0.0, tiny, -tiny, inf, -inf]
    for i, value in enumerate(special):
        scores[(3 + 7 * i) % size] = value
    return scores


@pytest.mark.interpreter_share(size=[11, 513], dtype=[torch.float32])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("size", [11, 128, 513, 4096, 4097])
def test_order_is_that_of_pythons_sort(
    impl: str, interpreted: bool, size: int, dtype: torch.dtype
) -> None:
    if interpreted and size == 4096:
        pytest.skip("a minute in the interpreter; 513 is past the block of 512, too")
    for scores in (torch.randn(size).to(dtype), awkward(size, dtype)):
        before = scores.clone()
        for k in (size // 2,) if interpreted else (1, size // 2, size):
            got = select_hardest(scores, k, impl=impl)
            assert got.index.dtype == torch.int64
            assert got.index.tolist() == hardest(scores, k)
            assert got.num_nan.item() == scores.isnan().sum()
            assert got.num_nan.shape == ()
            assert got.gathered == ()
        assert torch.equal(scores.nan_to_num(9.0), before.nan_to_num(9.0))


def test_all_equal_and_all_nan(impl: str) -> None:
    for value in (0.0, math.nan):
        got = select_hardest(torch.full((70,), value), 5, impl=impl)
        assert got.index.tolist() == [0, 1, 2, 3, 4]
        assert got.num_nan.item() == (70 if math.isnan(value) else 0)


def test_strides_do_not_matter(impl: str) -> None:
    scores = torch.randn(40)
    apart = torch.stack((scores, torch.full((40,), math.nan)), 1)[:, 0]
    got = select_hardest(apart, 40, impl=impl)
    assert got.index.tolist() == hardest(scores, 40)
    assert got.num_nan.item() == 0


def test_k_and_ratio(impl: str) -> None:
    scores = torch.randn(30)
    order = hardest(scores, 30)
    for arguments, length in (
        ({"k": 7}, 7),
        # The released pick keeps all of a pool that is smaller than its constant.
        ({"k": 64}, 30),
        ({"ratio": 0.5}, 15),
        ({"ratio": 1.0}, 30),
        ({"ratio": 0.34}, 11),
        # 0.1 * 30 is 3.0000000000000004
        ({"ratio": 0.1}, 3),
        ({"ratio": 1e-6}, 1),
    ):
        assert select_hardest(scores, **arguments, impl=impl).index.tolist() == order[:length]


@pytest.mark.parametrize("size", [0, 1])
def test_empty_and_single_pools(impl: str, size: int) -> None:
    for arguments in ({"k": 3}, {"ratio": 0.5}):
        got = select_hardest(torch.randn(size), gather=torch.randn(size, 2), **arguments, impl=impl)
        assert got.index.tolist() == [0] * size
        assert got.num_nan.item() == 0
        assert got.gathered[0].shape == (size, 2)


def test_large_pools_are_right(impl: str) -> None:
    scores = torch.randint(0, 1000, (100_003,)).float()
    scores[77] = math.nan
    got = select_hardest(scores, 50_000, impl=impl)
    assert got.index.tolist() == hardest(scores, 50_000)
    assert got.num_nan.item() == 1


def test_gathered_rows_keep_layout_and_gradient(impl: str) -> None:
    images = torch.randn(10, 3, 4, 4).to(memory_format=torch.channels_last)
    logits = torch.randn(10, 5, requires_grad=True)
    scores = hardness(logits, logits.detach().flip(0), impl=impl)
    assert not scores.requires_grad
    index, _, (picked_images, picked_logits) = select_hardest(
        scores, 4, gather=(images, logits), impl=impl
    )
    assert torch.equal(picked_images, images[index])
    assert picked_images.is_contiguous(memory_format=torch.channels_last)
    (3 * picked_logits).sum().backward()
    want = torch.zeros(10, 5)
    want[index] = 3
    assert torch.equal(logits.grad, want)


@pytest.mark.usefixtures("needs_cpp")
def test_every_instruction_set_gives_the_same() -> None:
    from fastkd.kernels._library import Core, core
    from fastkd.kernels.hardness import cpu

    found = core()
    assert isinstance(found, Core)
    for dtype in (torch.float32, torch.float64):
        scores = awkward(1000, dtype)
        for isa in found.isas:
            index, num_nan = cpu.select_hardest(scores, 1000, isa=isa)
            assert index.tolist() == hardest(scores, 1000)
            assert num_nan.item() == 2


BAD = {
    "matrix": (dict(scores=torch.randn(4, 4), k=1), r"got scores \[4, 4\].*vector \[N\]"),
    "integers": (dict(scores=torch.arange(4), k=1), "torch.int64; expected a floating point"),
    "neither": (dict(scores=torch.randn(4)), "got k=None and ratio=None; expected exactly one"),
    "both": (dict(scores=torch.randn(4), k=1, ratio=0.5), "got k=1 and ratio=0.5"),
    "k": (dict(scores=torch.randn(4), k=0), "got k=0; expected at least 1"),
    "ratio": (dict(scores=torch.randn(4), ratio=1.5), "got ratio=1.5; expected above 0, at most 1"),
    "gather": (
        dict(scores=torch.randn(4), k=1, gather=torch.randn(5, 2)),
        r"got a tensor \[5, 2\] to gather from; expected 4 rows",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_named(name: str) -> None:
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        select_hardest(**arguments)
