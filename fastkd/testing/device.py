"""The device under test: no host waits, calls as CUDA graphs, an interpreter that rounds once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import torch

__all__ = [
    "captured",
    "interpret_bf16_as_chips_do",
    "interpret_fma_as_fused",
    "no_host_sync",
]


@contextmanager
def no_host_sync(device: torch.device) -> Iterator[None]:
    """Raise inside where the host waits for a CUDA device; on a CPU there is nothing to watch."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`run` recorded once as a CUDA graph; calling it replays and returns what `run` returned.

    Its tensors keep their addresses: write new inputs into the old ones. On a CPU: `run` itself.
    """
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # compilation and first allocations must not be recorded
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()

    def replay() -> Any:
        graph.replay()
        return held

    return replay


def interpret_fma_as_fused() -> None:
    """Make Triton's interpreter round `tl.fma` once, as every GPU does; 3.6 rounds it twice."""
    interpreter: Any = import_module("triton.runtime.interpreter")
    if hasattr(interpreter._interpreter, "fma_fp32"):
        return

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # The product of two fp32 numbers is exact in 64 bits of mantissa.
        a, b, c = (np.asarray(part.data, np.longdouble) for part in (x, y, z))
        return interpreter.TensorHandle((a * b + c).astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


def interpret_bf16_as_chips_do() -> None:
    """Make Triton's interpreter round to bf16 and multiply bf16 matrices; call it once.

    It truncates where every GPU rounds to nearest, and `tl.dot` takes the bits for integers.
    """
    interpreter: Any = import_module("triton.runtime.interpreter")
    language: Any = import_module("triton.language")
    builder: Any = interpreter.InterpreterBuilder
    dot, cast, convert = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def wide(x: Any) -> Any:
        if x.dtype.scalar != language.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), language.float32)

    def rounded(x: Any) -> Any:
        # To nearest even; a NaN keeps its highest bits, one of which must be set.
        bits = np.ascontiguousarray(x.data).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        half = np.where(np.isnan(x.data), (bits >> 16) | 0x40, nearest).astype(np.uint16)
        return interpreter.TensorHandle(half, language.bfloat16)

    def is_rounding(x: Any, to: Any) -> bool:
        return x.dtype.scalar == language.float32 and to.scalar == language.bfloat16

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), d, *rest)

    def cast_impl(self: Any, x: Any, to: Any) -> Any:
        return rounded(x) if is_rounding(x, to) else cast(self, x, to)

    def create_fp_to_fp(self: Any, x: Any, to: Any, mode: Any) -> Any:
        return rounded(x) if is_rounding(x, to) else convert(self, x, to, mode)

    builder.create_dot, builder.create_fp_to_fp = create_dot, create_fp_to_fp
    # create_fp_trunc and its like look it up when they are called.
    builder.cast_impl = cast_impl
