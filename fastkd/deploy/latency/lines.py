"""Results as lines of text: the one table of `fastkd latency`, its script and `--read`.

Part of the script for other devices: it takes plain values, as they are in the JSON.
"""

from typing import Any

__all__ = ["HEADER", "MOST_LAYERS", "layer_lines", "notes", "row_line", "title"]

MOST_LAYERS = 25
"""Lines of a table of layers; the JSON has all of them."""

_WIDTHS = (8, 12, 8, 10, 10, 10, 10, 8)


def _line(*cells: Any) -> str:
    texts = [f"{cells[0]!s:<{_WIDTHS[0]}}"]
    texts += [f"{cell!s:>{width}}" for cell, width in zip(cells[1:], _WIDTHS[1:], strict=True)]
    return "  " + "".join(texts)


HEADER = _line("on", "input", "threads", "p10 ms", "p50 ms", "p90 ms", "images/s", "calls")


def title(report: dict[str, Any]) -> list[str]:
    """Network and machine."""
    machine = report["machine"]
    cores = f"{machine['cores']} core{'' if machine['cores'] == 1 else 's'}"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return [f"{report['network']} on {machine['cpu']}, {cores}", f"  {versions}"]


def row_line(row: dict[str, Any]) -> str:
    """One measured row."""
    shape = "x".join(map(str, row["input"]))
    # A clock may be too coarse for a small layer.
    rate = f"{row['input'][0] / row['p50_ms'] * 1e3:,.4g}" if row["p50_ms"] else "-"
    times = [f"{row[key]:.4g}" for key in ("p10_ms", "p50_ms", "p90_ms")]
    line = _line(row["on"], shape, row["threads"], *times, rate, row["calls"])
    return line if row["steady"] else f"{line}  not steady"


def layer_lines(row: dict[str, Any]) -> list[str]:
    """The layers of a row, slowest first."""
    layers = row["layers"]
    if not layers:
        return []
    shape = "x".join(map(str, row["input"]))
    lines = [f"\nLayers on {row['on']}, {shape}, {_threads(row['threads'])}: {row['layers_by']}"]
    shown = layers[:MOST_LAYERS]
    width = max(len(layer["name"]) for layer in shown)
    for layer in shown:
        cells = f"{layer['ms']:>10.4g} ms {layer['share']:>7.1%}  {layer['kind']}"
        lines.append(f"  {layer['name']:<{width}}{cells}".rstrip())
    if rest := layers[MOST_LAYERS:]:
        share = sum(layer["share"] for layer in rest)
        lines.append(f"  and {len(rest)} more, together {share:.1%}")
    return lines


def _threads(number: int) -> str:
    return f"{number} thread{'' if number == 1 else 's'}"


def notes(report: dict[str, Any]) -> list[str]:
    """What was not measured, the clock, and what a reader must know."""
    lines = []
    for one in report["missing"]:
        where = [one["on"]]
        where += [f"batch {one['batch']}"] if one["batch"] else []
        where += [_threads(one["threads"])] if one["threads"] else []
        lines.append(f"  {', '.join(where)}: {one['reason']}")
    warm = report["rule"]
    lines.append(
        f"Warm once two windows of {warm['window_s']:g} s differ by at most "
        f"{warm['tolerance']:.0%} at p50, or after {warm['warm_up_s']:g} s; then at least "
        f"{warm['calls']:g} calls and {warm['seconds']:g} s."
    )
    lines.append(f"Clock: {report['clock']}.")
    if report["reference"]:
        lines.append(f"Each answer was compared with {report['reference']} before it was timed.")
    return lines + report["caveats"]
