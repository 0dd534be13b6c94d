"""Progress of the one slow part of loading: decoding a folder into the cache."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Progress", "show_progress"]

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


@contextmanager
def show_progress(what: str, progress: Progress | None) -> Iterator[Progress]:
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
