"""Attention-transfer loss, forward and backward: fastkd against eager torch and torch.compile.

    pytest benchmarks/bench_attention_map.py [--pairs 20] [--save-results]

Runs on the GPU if there is one. Extra memory is the peak beyond the features and the gradient at
the student. A case whose loss or gradient is less accurate than allowed fails before any clock
starts.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastkd.kernels import attention_loss
from fastkd.kernels._library import Impl
from fastkd.testing import (
    assert_loss_as_accurate,
    eager_attention_loss,
    forward_backward,
    freshly_compiled,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STUDENT, TEACHER = (128, 32, 32, 32), (128, 128, 32, 32)
LAYOUTS, DTYPES = ["NCHW", "channels-last"], [torch.float32, torch.bfloat16]


def extra_bytes(run: Callable[[], object], gradient_bytes: int, device: str = DEVICE) -> int:
    """Peak memory that `run` takes from torch's allocator, without the gradient."""
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before - gradient_bytes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    assert record.profiler is not None
    assert record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak - gradient_bytes


def sides_of(
    dtype: torch.dtype,
    layout: str,
    device: str,
    impl: Impl | None = None,
    shapes: tuple[tuple[int, ...], ...] = (STUDENT, TEACHER),
) -> tuple[dict[str, Callable[[], None]], int, int]:
    """Forward and backward pass of each side, checked; bytes to move, bytes of the gradient."""
    torch.manual_seed(0)
    order = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    student, teacher = (
        torch.randn(shape, device=device).to(dtype=dtype, memory_format=order) for shape in shapes
    )
    fused = partial(attention_loss, impl=impl)
    assert_loss_as_accurate("attention_loss", fused, eager_attention_loss, student, teacher)
    sides = {
        "eager": eager_attention_loss,
        "compile": freshly_compiled(eager_attention_loss),
        "fastkd": fused,
    }
    timed = {name: forward_backward(side, student, teacher) for name, side in sides.items()}
    # Both are read, the student once more in the backward pass, which writes its gradient.
    elements = 3 * student.numel() + teacher.numel()
    gradient_bytes = student.numel() * student.element_size()
    return timed, elements * student.element_size(), gradient_bytes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def bench_attention_loss(dtype, layout, table, race) -> None:
    sides, _, gradient_bytes = sides_of(dtype, layout, DEVICE)
    found = race(sides)
    extra = {name: extra_bytes(run, gradient_bytes) for name, run in sides.items()}
    table.rows.append(
        {
            "dtype": str(dtype).removeprefix("torch."),
            "layout": layout,
            **found.cells(),
            **{f"{name} extra MB": number / 1e6 for name, number in extra.items()},
            "share of eager's": extra["fastkd"] / extra["eager"],
        }
    )
