"""What a compression says at its end: one table, a verdict from the measurement, a picture."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastkd.compress.folder import CompressFolder
from fastkd.compress.target import Target, amount
from fastkd.report.tradeoff import Point, draw_tradeoff
from fastkd.storage.atomic import atomic_path

__all__ = ["Row", "proposals_table", "result_of", "spearman", "verdict"]


@dataclass(frozen=True)
class Row:
    """A network in the table."""

    name: str
    label: str
    accuracies: list[float]
    """Of each seed."""
    ms: list[float]
    """p10, p50 and p90."""
    macs: int
    params: int

    def cells(self) -> list[str]:
        """As text."""
        p10, p50, p90 = self.ms
        mean = f"{statistics.mean(self.accuracies):.2%}"
        if len(self.accuracies) > 1:
            mean += f" +- {100 * statistics.stdev(self.accuracies):.2f}"
        times = f"{p50:.4g} ({p10:.4g}-{p90:.4g})"
        return [self.name, mean, times, amount(self.macs), amount(self.params), self.label]


HEADERS = ["network", "accuracy", "ms p50 (p10-p90)", "MACs", "parameters", "what it is"]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text: the first and the last to the left, the others to the right."""
    widths = [max(len(line[number]) for line in lines) for number in range(len(lines[0]))]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if number in (0, last) else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def proposals_table(found: Mapping[str, Any], target: Target) -> list[str]:
    """The students of the search, and how far the sum of parts was from what was measured."""
    lines = [["", "id", "estimate", "whole", "Fisher", "student"]]
    for row in found["tried"]:
        fits = "" if row["fits"] else "over"
        costs = [target.words(row["estimate"]), target.words(row["cost"])]
        lines.append([fits, row["id"], *costs, f"{row['potential']:.3g}", row["label"]])
    return [f"  {line}" for line in aligned(lines)]


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Rank correlation, equal values at their mean rank; None if one side is all equal."""
    if len(one) < 2 or len(set(one)) == 1 or len(set(other)) == 1:
        return None
    return statistics.correlation(_ranks(one), _ranks(other))


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]


def verdict(target: Target, cost: float, limit: float) -> tuple[bool, str]:
    """Whether the target is met, and the sentence that says so; never by an estimate."""
    how = "measured" if target.quantity == "latency" else "counted"
    costs, most = target.words(cost), target.words(limit)
    if cost <= limit:
        return True, f"target {target} met: {costs} {how}, at most {most} asked for"
    return False, (
        f"target {target} missed: {costs} {how}, {cost / limit - 1:.1%} above the {most} asked "
        f"for; it is not claimed"
    )


def result_of(
    rows: Sequence[Row],
    target: Target,
    folder: CompressFolder,
    *,
    limit: float | None,
    extra: Mapping[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Print and write the table, the verdict and the picture.

    limit: of the cost; None for a share of what the original was measured with beside the others.
    """

    def cost(row: Row) -> float:
        own = {"latency": row.ms[1], "macs": row.macs, "params": row.params}
        return float(own[target.quantity])

    by_name = {row.name: row for row in rows}
    most = target.limit(cost(by_name["original"])) if limit is None else limit
    met, sentence = verdict(target, cost(by_name["chosen"]), most)
    lines = [HEADERS, *(row.cells() for row in rows)]
    for line in aligned(lines):
        say(line)
    say(sentence)
    result = {
        "target": str(target),
        "limit": most,
        "met": met,
        "verdict": sentence,
        "rows": [asdict(row) for row in rows],
        **extra,
    }
    folder.write("result.json", result)
    rule = [":--", "--:", "--:", "--:", "--:", ":--"]
    table = "\n".join(f"| {' | '.join(one)} |" for one in [HEADERS, rule, *lines[1:]])
    with atomic_path(folder.path / "table.md") as beside:
        beside.write_text(f"{table}\n\n{sentence}\n", encoding="utf-8")
    latency = target.quantity == "latency"
    say(
        draw_tradeoff(
            folder.path / "pareto.png",
            [_point(row) for row in rows],
            cost="milliseconds of a call, p50 with p10 to p90",
            limit=most if latency else None,
            title=str(target),
        )
    )
    return result


def _point(row: Row) -> Point:
    spread = statistics.stdev(row.accuracies) if len(row.accuracies) > 1 else 0.0
    p10, p50, p90 = row.ms
    return Point(row.name, p50, statistics.mean(row.accuracies), spread, p10, p90)
