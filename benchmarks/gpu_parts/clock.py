"""Clocks for a GPU: cold cache, interleaved sides, device time apart from host time.

`as called` is what a caller waits for on the device, gaps between launches included: CUDA events
around the call after a pass over a buffer larger than the cache. `captured` is the same work as one
CUDA graph, without the host. On a CPU (rehearsals) both are wall time.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

from fastkd.testing import WARM_UP, captured, interleave, no_host_sync, turns

__all__ = ["Sides", "copy_gbps", "kernel_seconds", "peak_bytes", "times"]

Sides = dict[str, Callable[[], Any]]
_CACHE_BYTES = 256 << 20


def times(
    sides: Sides, device: torch.device, *, pairs: int, capture: bool = False
) -> dict[str, list[float]]:
    """Seconds per call of each side, in turns whose order alternates.

    With `capture`, of one CUDA graph per side; a side that cannot be captured is left out.
    """
    if capture:
        sides = {
            name: captured(run, device) for name, run in sides.items() if waits_not(run, device)
        }
    if device.type != "cuda":
        return interleave(sides, pairs)
    flush = torch.empty(_CACHE_BYTES // 4, dtype=torch.int32, device=device)
    for name in turns(sides, WARM_UP):
        sides[name]()
    events: dict[str, list[Any]] = {name: [] for name in sides}
    for done, name in enumerate(turns(sides, pairs), start=1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        sides[name]()
        end.record()
        events[name].append((begin, end))
        if done % (16 * len(sides)) == 0:
            # The queue is short on purpose: a full one would block the host inside a side.
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return {
        name: [begin.elapsed_time(end) / 1e3 for begin, end in pairs_of]
        for name, pairs_of in events.items()
    }


def waits_not(run: Callable[[], Any], device: torch.device) -> bool:
    """Whether a call never makes the host wait: one that does cannot be captured.

    Asked before, because a failed capture leaves the generator and the allocator unusable.
    """
    run()
    try:
        with no_host_sync(device):
            run()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return False
    return True


def copy_gbps(device: torch.device, size: int) -> float:
    """GB/s of a copy on the device, read plus written: the yardstick of the kernels."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = times({"copy": lambda: target.copy_(source)}, device, pairs=20)["copy"]
    return 2 * size / statistics.median(seconds) / 1e9


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Peak device memory in use during a call, 0 on a CPU."""
    run()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device)


def kernel_seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, dict[str, float]]:
    """Seconds of a call in which a kernel was running, and seconds by kernel, longest first."""
    from torch.autograd.profiler_util import FunctionEvent
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=kinds) as seen:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA if device.type == "cuda" else None
    spans: list[tuple[float, float]] = []
    by_name: dict[str, float] = {}
    events: list[FunctionEvent] = list(seen.events() or [])
    for event in events:
        if on_device is None:
            if event.cpu_parent is not None:
                continue
        elif event.device_type != on_device or getattr(event, "is_user_annotation", False):
            continue
        spans.append((event.time_range.start, event.time_range.end))
        span_s = (event.time_range.end - event.time_range.start) / 1e6
        by_name[event.name] = by_name.get(event.name, 0.0) + span_s
    if not spans:  # a machine whose profiler sees no kernels
        return math.nan, {}
    # The union: teacher and student overlap on two streams.
    busy = reached = 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6, dict(sorted(by_name.items(), key=lambda item: -item[1]))
