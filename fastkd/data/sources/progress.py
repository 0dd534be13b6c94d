"""All images of a split one after the other in threads, with a bar."""

import os
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

__all__ = ["RUN", "Progress", "in_threads"]

RUN = 16
"""Images that a thread takes at a time: for small ones a task each costs as much as decoding."""

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


def in_threads(
    what: str, look: Callable[[int], T], total: int, chunk: int, progress: Progress | None = None
) -> Generator[list[T], None, None]:
    """`look` at images 0 .. total - 1, `chunk` of them at a time, in their order.

    In threads, as Pillow releases the GIL; in chunks, as a million tasks would take a gigabyte.
    what: words beside the bar on stderr; progress: is called instead.
    """

    def run(first: int, stop: int) -> list[T]:
        return [look(sample) for sample in range(first, min(first + RUN, stop))]

    with (
        _show_progress(what, progress) as report,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
    ):
        for start in range(0, total, chunk):
            stop = min(start + chunk, total)
            firsts = range(start, stop, RUN)
            yield list(chain.from_iterable(threads.map(run, firsts, [stop] * len(firsts))))
            report(stop, total)


@contextmanager
def _show_progress(what: str, progress: Progress | None) -> Iterator[Progress]:
    """The caller's callback, or a bar on stderr (on a terminal) or one line (elsewhere)."""
    if progress is not None:
        yield progress
        return
    if not sys.stderr.isatty():
        print(f"{what} ...", file=sys.stderr, flush=True)
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
