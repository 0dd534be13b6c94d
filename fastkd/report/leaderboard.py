"""The leaderboard: our number beside the paper's for every recipe that was run, a miss as a miss.

Flow: `fastkd report --leaderboard` gives run folders and files of benchmarks/results; this writes
leaderboard.md and leaderboard.html. What was not run is counted and listed by paper.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from fastkd.errors import UserError
from fastkd.evaluation.headline import HEADLINES, headline
from fastkd.recipes.catalogue import all_recipes, recipes_by_module
from fastkd.recipes.entry import Entry
from fastkd.recipes.listing import title_of_module
from fastkd.recipes.published import METRICS
from fastkd.report.benchmark_files import Benchmark, read_benchmark
from fastkd.report.collecting import recipe_of
from fastkd.report.page import document
from fastkd.report.paper import paper_row
from fastkd.report.runs_read import ReportedRun, read_runs
from fastkd.storage.atomic import atomic_path, writing

__all__ = ["write_leaderboard"]

STEM = "leaderboard"
COMMAND = "fastkd report --leaderboard"
_HEAD = ("recipe", "ours", "seeds", "std", "paper", "difference", "")
_OTHERS = ("run", "ours", "seeds", "std", "what differs from the paper's row")
_BENCH = ("what", "ours", "seeds", "std", "over the student alone")


@dataclass(frozen=True)
class _Section:
    """A part of the page in both formats."""

    title: str
    text: list[str] = field(default_factory=list)
    head: Sequence[str] = ()
    rows: list[list[str]] = field(default_factory=list)
    items: dict[str, list[str]] = field(default_factory=dict)
    """Long lists by a line of their own, closed at first."""


@dataclass
class _Row:
    """Finished runs of one recipe, with one set of changed keys."""

    facts: dict[str, Any] | None
    """As of `PaperRow`; None without a paper's number."""
    keys: Mapping[str, Any]
    values: list[dict[str, float]] = field(default_factory=list)


def write_leaderboard(paths: Sequence[str], out: Path, *, say: Callable[[str], None]) -> list[Path]:
    """Write leaderboard.md and leaderboard.html below `out`; returns the files.

    paths: run folders or folders of them, and JSON files of benchmarks/results. say: is told which
    files have no accuracies.

    Raises:
        UserError: there is nothing to list.
        RunFailed: a file cannot be written.
    """
    files = [Path(path) for path in paths if path.endswith(".json")]
    folders = [path for path in paths if not path.endswith(".json")]
    runs = read_runs(folders) if folders else []
    benchmarks: list[Benchmark] = []
    for file in files:
        try:
            benchmarks.append(read_benchmark(file))
        except UserError as error:
            say(f"left out: {error}")
    if not runs and not benchmarks:
        raise UserError(
            f"name what was run: {COMMAND} runs/ benchmarks/results/quickstart_seeds.json"
        )
    sections = [*_of_runs(runs), *map(_of_benchmark, benchmarks), _not_run(runs)]
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name, text in ((f"{STEM}.md", _markdown(sections)), (f"{STEM}.html", _html(sections))):
        with atomic_path(out / name) as beside:
            beside.write_text(text, encoding="utf-8")
        written.append(out / name)
    return written


def _of_runs(runs: Sequence[ReportedRun]) -> list[_Section]:
    """Rows of papers, then what cannot be compared with one."""
    known, grouped = all_recipes(), dict[tuple[str, str], _Row]()
    for run in runs:
        recipe = recipe_of(run) if run.finished and run.name in known else None
        if recipe is None or run.summary is None:
            continue
        metric = headline(run.summary)
        value = {key: run.summary[key] for key in (f"{metric}_last", f"{metric}_best")}
        paper = paper_row(recipe.name, recipe.dotted(), run.summary)
        changed = ", ".join(paper.facts["changed"]) if paper else ""
        row = grouped.setdefault(
            (recipe.name, changed), _Row(paper.facts if paper else None, recipe.dotted())
        )
        row.values.append(value)
    compared, others = list[list[str]](), list[list[str]]()
    for (name, changed), row in sorted(grouped.items()):
        if row.facts is not None and not changed:
            compared.append(_against_paper(name, row))
        else:
            others.append(_alone_standing(name, changed, row))
    return [
        _Section(
            "Rows of the papers",
            [
                "Recipes that were run as the paper prints them. `reached`: our mean is at least "
                "as good; `within the spread`: it is worse by no more than a standard deviation, "
                "the paper's or ours; `missed`: it is worse."
                if compared
                else "No recipe of a paper was run with its keys unchanged."
            ],
            _HEAD if compared else (),
            compared,
        ),
        *([_Section("Other runs of recipes", [], _OTHERS, others)] if others else []),
    ]


def _against_paper(name: str, row: _Row) -> list[str]:
    assert row.facts is not None
    each: list[float] = []
    for value in row.values:
        found = paper_row(name, row.keys, value)
        assert found is not None
        each.append(found.facts["ours"])
    facts, ours = row.facts, statistics.mean(each)
    std = statistics.stdev(each) if len(each) > 1 else None
    ahead = ours - facts["value"]
    if facts["metric"].endswith("error"):
        ahead = -ahead
    verdict = "reached" if ahead >= 0 else "missed"
    if verdict == "missed" and -ahead <= max(std or 0.0, facts["std"] or 0.0):
        verdict = "within the spread"
    spread = "" if facts["std"] is None else f" +- {facts['std']:.2f}"
    return [
        name,
        f"{METRICS[facts['metric']]} {ours:.2f}",
        str(len(each)),
        _points(std),
        f"{facts['value']:.2f}{spread} ({facts['place']})",
        f"{ours - facts['value']:+.2f}",
        verdict,
    ]


def _alone_standing(name: str, changed: str, row: _Row) -> list[str]:
    metric = headline(row.values[0])
    each = [100 * value[f"{metric}_last"] for value in row.values]
    std = statistics.stdev(each) if len(each) > 1 else None
    reached = f"{HEADLINES[metric]} {statistics.mean(each):.2f}"
    return [name, reached, str(len(each)), _points(std), changed or "no paper prints a number"]


def _of_benchmark(one: Benchmark) -> _Section:
    rows = [
        [
            group.name,
            f"{HEADLINES[one.metric]} {100 * group.mean:.2f}",
            str(len(group.values)),
            _points(None if group.std is None else 100 * group.std),
            str(group.gain or ""),
        ]
        for group in one.groups
    ]
    about = " ".join(filter(None, (one.about, f"From {one.file.name}: `{one.command}`.")))
    return _Section(one.title, [about], _BENCH, rows)


def _not_run(runs: Sequence[ReportedRun]) -> _Section:
    """The rows of every paper that no finished run has, whatever keys were changed."""
    ran = {run.name for run in runs if run.finished}
    items: dict[str, list[str]] = {}
    total = missing = 0
    for module, entries in recipes_by_module().items():
        rows = [entry for entry in entries.values() if entry.published and entry.row is None]
        if not rows:
            continue
        left = [entry for entry in rows if entry.name not in ran]
        total, missing = total + len(rows), missing + len(left)
        line = f"{title_of_module(module)}: {len(left)} of {len(rows)} recipes not run"
        items[line] = _by_pair(left)
    text = (
        f"{missing} of the {total} recipes that are rows of papers were not run; behind each "
        f"method the paper's number, in percent."
    )
    return _Section("Not run", [text], items=items)


def _by_pair(entries: Sequence[Entry]) -> list[str]:
    """`kdda/cifar100/A--B: kd 74.92, at 74.08`: the paper's numbers of all methods of a pair."""
    pairs: dict[str, list[str]] = {}
    for entry in entries:
        pair, _, method = entry.name.rpartition("/")
        pairs.setdefault(pair, []).append(f"{method} {entry.published[0].value:.2f}")
    return [f"{pair}: {', '.join(methods)}" for pair, methods in pairs.items()]


def _points(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _markdown(sections: Sequence[_Section]) -> str:
    lines = ["# Leaderboard", "", f"<!-- written by `{COMMAND}` -->", "", *_intro()]
    for one in sections:
        lines += ["", f"## {one.title}"]
        for text in one.text:
            lines += ["", text]
        if one.rows:
            lines += ["", _row(one.head), _row(["---"] * len(one.head))]
            lines += [_row([cell.replace("|", r"\|") for cell in row]) for row in one.rows]
        for line, items in one.items.items():
            lines += ["", f"<details><summary>{escape(line)}</summary>", ""]
            lines += [f"- {item}" for item in items]
            lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _html(sections: Sequence[_Section]) -> str:
    parts = [f'<p class="quiet">{_code(line)}</p>' for line in _intro() if line]
    for one in sections:
        parts.append(f"<h2>{escape(one.title)}</h2>")
        parts += [f"<p>{_code(text)}</p>" for text in one.text]
        if one.rows:
            head = "".join(f"<th>{escape(cell)}</th>" for cell in one.head)
            body = "\n".join(
                f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
                for row in one.rows
            )
            parts.append(
                f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
                f"<tbody>{body}</tbody></table></div>"
            )
        for line, items in one.items.items():
            inside = "".join(f"<li>{escape(item)}</li>" for item in items)
            parts.append(f"<details><summary>{escape(line)}</summary><ul>{inside}</ul></details>")
    return document("Leaderboard", parts)


def _intro() -> list[str]:
    return [
        "Our numbers beside those of the papers: the mean of the last (or the best) epoch over the "
        "seeds, as the paper counts it, and the sample standard deviation (std), in points.",
    ]


def _code(text: str) -> str:
    """Escaped, with what is between backticks as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{one}</code>" if number % 2 else one for number, one in enumerate(parts))
