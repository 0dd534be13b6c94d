"""The files of `fastkd report`: figures in every format, the table of runs, and the page.

Flow: `fastkd.cli.reporting` reads and names the runs; this draws what they have data for and writes
all of it into one folder. A figure that fails is named and left out.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fastkd.errors import RunFailed, UserError
from fastkd.output.run_folder import csv_text
from fastkd.output.table import as_html, as_latex, as_markdown
from fastkd.printable import in_words, shown
from fastkd.report.collecting import Collected
from fastkd.report.figures import FIGURES, FigureKind
from fastkd.report.figures.figure import save
from fastkd.report.page import Shown, page
from fastkd.storage.atomic import atomic_path, writing

__all__ = ["PAGE", "chosen", "lines_of_figures", "write_report"]

PAGE = "index.html"
_ABOUT = ("row", "run", "runs")
_MORE = ("best_epoch", "gain", "gain_se", "of_teacher", "params", "macs", "images_per_s", "note")


def chosen(names: Sequence[str] | None) -> list[FigureKind]:
    """The kinds of these names, all without any. UserError for a name that does not exist."""
    if names is None:
        return list(FIGURES.values())
    for name in names:
        if name not in FIGURES:
            raise UserError(
                f"there is no figure {shown(name)}: choose of {', '.join(FIGURES)} "
                f"(fastkd report --list)"
            )
    return [FIGURES[name] for name in dict.fromkeys(names)]


def lines_of_figures(kinds: Iterable[FigureKind]) -> list[str]:
    """What `--list` prints: name, title, paper, what the runs must have."""
    return [
        line
        for kind in kinds
        for line in (
            f"{kind.name}: {kind.title}{f' ({kind.source})' if kind.source else ''}",
            f"    needs {kind.needs}",
        )
    ]


def write_report(
    collected: Collected,
    out: Path,
    *,
    kinds: Sequence[FigureKind],
    formats: Sequence[str],
    say: Callable[[str], None],
) -> list[Path]:
    """Draw, and write everything below `out`; returns the files.

    formats: of `fastkd.report.figures.figure.FORMATS`. say: is told what is left out and why.

    Raises:
        RunFailed: a file cannot be written.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    figures: list[Shown] = []
    lacking: list[FigureKind] = []
    for kind in kinds:
        try:
            drawn = kind.of(collected.runs)
            if drawn is None:
                lacking.append(kind)
                continue
            written += save(drawn, out / kind.name, formats)
        except (RunFailed, UserError):
            raise
        except Exception as error:  # what strangers' numbers do to one figure spares the others
            say(f"no figure {kind.name}: {in_words(error)}")
            continue
        figures.append(Shown(kind, drawn))
    written += _table(collected, out, formats)
    text = page(
        _title(collected),
        table=as_html(collected.rows),
        verdicts=collected.verdicts,
        figures=figures,
        lacking=lacking,
        notes=["Accuracies of the last and of the best epoch, on the validation images."],
    )
    written.append(_write(out / PAGE, text))
    if lacking:
        say(
            f"nothing in these runs for {', '.join(kind.name for kind in lacking)}: what each "
            f"needs says fastkd report --list"
        )
    return written


def _title(collected: Collected) -> str:
    names = list(dict.fromkeys(run.name for run in collected.runs))
    count = len(collected.runs)
    runs = f"{count} run{'' if count == 1 else 's'}"
    more = f" and {len(names) - 3} more recipes" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}: {runs}"


def _table(collected: Collected, out: Path, formats: Sequence[str]) -> list[Path]:
    """table.csv with numbers in full, table.tex and table.md as they are printed."""
    written: list[Path] = []
    if "csv" in formats:
        measured = {
            key for row in collected.rows for key in row if key.endswith(("_last", "_best"))
        }
        keys = (*_ABOUT, *sorted(measured, reverse=True), *_MORE)
        lines = [{key: row.get(key) for key in keys} for row in collected.rows]
        written.append(_write(out / "table.csv", csv_text(lines)))
    if "tex" in formats:
        verdicts = "".join(f"% {one}\n" for one in collected.verdicts)
        written.append(_write(out / "table.tex", as_latex(collected.rows) + verdicts))
    verdicts = "".join(f"\n{one}\n" for one in collected.verdicts)
    written.append(_write(out / "table.md", as_markdown(collected.rows) + verdicts))
    return written


def _write(target: Path, text: str) -> Path:
    with atomic_path(target) as beside:
        beside.write_text(text, encoding="utf-8")
    return target
