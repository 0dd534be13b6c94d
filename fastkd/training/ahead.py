"""Work for the next step, done while the current one runs: one item ahead, on a side stream."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

__all__ = ["run_ahead", "side_stream"]

T = TypeVar("T")


@functools.cache
def side_stream(device: torch.device) -> Any:
    """One stream of a GPU for all epochs: the allocator keeps memory per stream."""
    return torch.cuda.Stream(device)


def run_ahead(
    items: Iterator[T],
    device: torch.device,
    stream_of: Callable[[torch.device], Any] = side_stream,
) -> Iterator[T]:
    """Work of `items` (augmentation, teacher) one item ahead on a side stream of a GPU.

    On a CPU the items come as they are. The side stream begins item n + 2 once the main stream is
    done with item n, whose memory it may then reuse: at most three items are alive, however far the
    host has run ahead (with record_stream there would be one per step that the host is ahead).

    stream_of: makes, or looks up, the side stream of a device.
    """
    if device.type != "cuda":
        yield from items
        return
    side = stream_of(device)
    # What the loader put on the device (images, tables) must have arrived.
    side.wait_stream(torch.cuda.current_stream(device))

    def launch() -> tuple[T, Any] | None:
        with torch.cuda.stream(side):
            item = next(items, None)
            return None if item is None else (item, side.record_event())

    pending = launch()
    while pending is not None:
        item, ready = pending
        pending = launch()
        torch.cuda.current_stream(device).wait_event(ready)
        yield item
        side.wait_stream(torch.cuda.current_stream(device))
