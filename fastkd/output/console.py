"""What a run prints: a live bar per stage on a terminal, elsewhere one line per epoch, more in long
ones.

Each stage leaves one line on a terminal, that of its last epoch; in a notebook one output, which is
redrawn (`notebook`). Flow: `cli` makes one `Console` per process, enabled on rank 0 only; stages
and trainer use it.
Nothing here reads a tensor; the trainer has fetched the numbers. Everything goes to stdout; `cli`
writes errors to stderr.
"""

import atexit
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console as RichConsole
from rich.table import Column, Table
from typing_extensions import override

from fastkd.evaluation.headline import HEADLINES
from fastkd.output.notebook import NotebookLine, in_notebook
from fastkd.output.streams import discard
from fastkd.output.table import DISPENSABLE, NOTE_WIDTH, comparison_table
from fastkd.printable import printable

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Console", "duration"]


# Keys of a metric row, in the order of an epoch's line -> label, format.
_OF_AN_EPOCH = {
    "train_loss": ("loss", ".4f"),
    **{f"val_{metric}": (printed, ".2%") for metric, printed in HEADLINES.items()},
    "images_per_s": ("images/s", ",.0f"),
    "data_wait": ("data wait", ".0%"),
}


_LEAST_WIDTH, _USUAL_WIDTH = 20, 80
_BARRED, _WIDE = 70, 100
"""Columns from which the live line has a bar, and from which it has room for everything."""
_WAITING = 0.1
"""Share of the time that is worth a word even where there is little room."""
_LOSSES = 4  # of several runs, in the live line


class _Screen(RichConsole):
    """When the reader of its output has gone, the run goes on without one."""

    @override
    def on_broken_pipe(self) -> None:
        self.quiet = True
        discard(self.file)


class Console:
    """The output of one process; with `enabled=False` there is none.

    `file` replaces stdout. `live` decides between the live line and plain lines; by default a
    terminal gets the live one, and a notebook its own. `verbose` adds a plain line per epoch to a
    live one.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        file: TextIO | None = None,
        live: bool | None = None,
        verbose: bool = False,
    ) -> None:
        self._enabled = enabled
        self._verbose = verbose
        self._notebook = enabled and file is None and live is None and in_notebook()
        self._output: NotebookLine | None = None
        """Of the stage, in a notebook."""
        # A path such as runs/:car:/[red] is neither an emoji nor a colour.
        self._rich = _Screen(
            file=file,
            force_terminal=live,
            # Or every line would be an output of its own, with markup around it.
            force_jupyter=False,
            highlight=False,
            soft_wrap=False,
            markup=False,
            emoji=False,
        )
        # COLUMNS may be anything, and in 0 columns nothing would be printed.
        if self._rich.width < _LEAST_WIDTH:
            self._rich.width = _USUAL_WIDTH
        self._live = self._rich.is_terminal and not self._rich.is_dumb_terminal
        self._tables = True
        self._bar: Progress | None = None
        self._stage = ""
        self._clock = _Clock()
        self._silence = _Silence()

    @property
    def enabled(self) -> bool:
        """Whether anybody reads it."""
        return self._enabled

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the live line from the terminal; also done at the end of the process.

        That of a notebook stays as it is.
        """
        self._output = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            atexit.unregister(self.close)

    def note(self, text: str) -> None:
        """One line, above the live one."""
        if self._enabled:
            # A path may have characters that the encoding of the terminal lacks.
            encoding = self._rich.encoding
            text = printable(text).encode(encoding, "backslashreplace").decode(encoding)
            self._rich.print(text, soft_wrap=True)

    def stage(self, name: str) -> None:
        """Name the stage of the following `progress` and `epoch` calls, and restart the clock."""
        self.close()
        self._stage = name
        self._clock = _Clock()
        self._silence = _Silence()

    def progress(
        self,
        *,
        epoch: int,
        epochs: int,
        step: int,
        steps: int,
        images_per_s: float,
        data_wait: float,
        loss: float | Sequence[float] | None = None,
    ) -> None:
        """Redraw the live line; without a terminal a plain line, where none came for long.

        `epoch` and `step` count what is done, of `epochs` and of `steps` per epoch; `data_wait` is
        a share of 1; `loss` is that of each run, if there are several.
        """
        if not self._enabled:
            return
        done = epoch * steps + step
        total = epochs * steps
        left_s = self._clock.left_s(done / total)
        if not self._live and not self._notebook and not self._silence.is_long():
            return
        facts = [f"epoch {min(epoch + 1, epochs)}/{epochs}", f"{images_per_s:,.0f} images/s"]
        if not self._live or self._rich.width >= _WIDE or data_wait >= _WAITING:
            facts.append(f"wait {data_wait:.0%}")
        if loss is not None:
            facts.append(f"loss {_losses(loss)}")
        if left_s is not None:
            facts.append(f"{duration(left_s)} left")
        if self._notebook:
            self._redraw([self._stage, *facts])
            return
        if not self._live:
            facts.insert(1, f"step {step}/{steps}")
            self.note("  ".join(filter(None, [self._stage, *facts])))
            return
        if self._bar is None:
            self._bar = _bar(self._rich)
            self._bar.start()
            atexit.register(self.close)
        bar = self._bar
        if not bar.tasks:
            bar.add_task(self._stage, total=total, facts="")
        bar.update(bar.tasks[0].id, completed=done, facts="  ".join(facts))
        bar.refresh()

    def epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        """An epoch's metrics as one plain line; on a terminal only for the last epoch, unless
        verbose. In a notebook in place of the live line.

        Takes a row of metrics.jsonl: `epoch` from 1, `train_loss`, and where known
        `val_accuracy` (or `val_map`, `val_miou`), `images_per_s`, `data_wait` (a share of 1) and
        `skipped`.
        """
        if not self._enabled:
            return
        left_s = self._clock.left_s(row["epoch"] / epochs)
        last = row["epoch"] == epochs
        if last and not self._notebook:
            self.close()
        if self._live and not last and not self._verbose:
            return
        words = [self._stage, f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"]
        words += [
            f"{label} {row[key]:{style}}"
            for key, (label, style) in _OF_AN_EPOCH.items()
            if row.get(key) is not None
        ]
        if row.get("skipped"):
            words.append(f"skipped steps {row['skipped']}")
        if row.get("unread"):
            words.append(f"images not read {row['unread']}")
        if left_s is not None and not last:
            words.append(f"{duration(left_s)} left")
        if self._notebook:
            self._redraw(words, at_once=last)
        else:
            self.note("  ".join(filter(None, words)))
        self._silence.ends()

    def _redraw(self, words: Sequence[str], *, at_once: bool = False) -> None:
        """In a notebook."""
        if self._output is None:
            self._output = NotebookLine()
        self._output.show(printable("  ".join(filter(None, words))), at_once=at_once)

    def facts(self, title: str, values: Mapping[str, Any]) -> None:
        """A titled list of names and values, one per line."""
        if not self._enabled:
            return
        lines = _flat(values)
        width = max((len(name) for name, _ in lines), default=0)
        self.note(title)
        for name, value in lines:
            self.note(f"  {name:<{width}}  {_readable(value)}")

    @contextmanager
    def without_tables(self) -> Generator[None]:
        """No closing tables of runs inside: their caller makes one of all of them."""
        before, self._tables = self._tables, False
        try:
            yield
        finally:
            self._tables = before

    def comparison(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The closing table; see `cells_of`. A narrow terminal does without some columns."""
        if not self._enabled or not self._tables:
            return
        self.close()
        screen = self._rich
        if screen.is_terminal:
            kept = range(len(DISPENSABLE) + 1)
            dropped = next((DISPENSABLE[:n] for n in kept if self._fits(rows, n)), DISPENSABLE)
            screen.print(comparison_table(rows, dropped=dropped))
            return
        # Whoever reads a pipe or a file can read long lines, but no names cut to pieces.
        table = comparison_table(rows)
        width = max(self._width(table), screen.width)
        _Screen(file=screen.file, width=width, highlight=False, markup=False, emoji=False).print(
            table
        )

    def _fits(self, rows: Sequence[Mapping[str, Any]], dropped: int) -> bool:
        """Whether the terminal is wide enough without the first dispensable columns."""
        # A note is folded.
        noteless = comparison_table(rows, dropped=(*DISPENSABLE[:dropped], "note"))
        note = 0 if "note" in DISPENSABLE[:dropped] else NOTE_WIDTH
        return self._width(noteless) + note <= self._rich.width

    def _width(self, table: Table) -> int:
        wide = self._rich.options.update(width=10_000)
        return self._rich.measure(table, options=wide).maximum


class _Clock:
    """Time left, from the progress since the first call (a run may be resumed)."""

    def __init__(self) -> None:
        self._start: tuple[float, float] | None = None

    def left_s(self, share: float) -> float | None:
        """Seconds, or None before there is any progress."""
        now = time.monotonic()
        if self._start is None or share < self._start[1]:
            self._start = (now, share)
        start_s, start_share = self._start
        if share <= start_share:
            return None
        return (now - start_s) / (share - start_share) * (1 - share)


class _Silence:
    """When a log that nobody redraws wants another line: after 30 s, then ever more rarely."""

    FIRST_S, LONGEST_S = 30.0, 600.0

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._bearable_s = self.FIRST_S

    def ends(self) -> None:
        """A line was printed."""
        self._since = time.monotonic()

    def is_long(self) -> bool:
        """Whether it has lasted too long; if so, the next one may last twice as long."""
        if time.monotonic() - self._since < self._bearable_s:
            return False
        self._bearable_s = min(2 * self._bearable_s, self.LONGEST_S)
        self.ends()
        return True


def _bar(console: RichConsole) -> "Progress":
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn

    columns: list[ProgressColumn] = [
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
        TextColumn("{task.fields[facts]}", markup=False, table_column=Column(no_wrap=True)),
    ]
    if console.width >= _BARRED:
        columns.insert(1, BarColumn(bar_width=16 if console.width >= _WIDE else 10))
    # No extra thread: the line is redrawn when there is something new.
    return Progress(*columns, console=console, transient=True, expand=True, auto_refresh=False)


def _losses(loss: float | Sequence[float]) -> str:
    """The first ones, where there are many."""
    every = loss if isinstance(loss, Sequence) else [loss]
    shown = " ".join(f"{one:.3f}" for one in every[:_LOSSES])
    return f"{shown} .." if len(every) > _LOSSES else shown


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            lines += _flat(value, f"{name}: ")
        else:
            lines.append((name, value))
    return lines


def _readable(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " x ".join(map(str, value)) if all(isinstance(v, int) for v in value) else str(value)
    return str(value)


def duration(seconds: float) -> str:
    """`0:07`, `12:40` or `3:05:00`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
