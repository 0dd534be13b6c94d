"""The page of a report: one HTML file with everything in it, which needs no network.

Flow: `fastkd.report.writing` passes what it has drawn. Figures are SVG inside of the page, in the
colour of its text, so that they suit a light and a dark screen; numbers are `data:` links.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fastkd import __version__
from fastkd.output.run_folder import csv_text
from fastkd.output.table import latex_rows
from fastkd.report.colours import INK
from fastkd.report.figures.figure import Drawn, FigureKind, house

__all__ = ["Shown", "document", "page"]

_LARGEST = 1_500_000
"""Characters of an SVG; a larger figure becomes a PNG."""

_STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --back: #ffffff; --quiet: #5c5c5c;
  --line: #d9d9d9; --link: #0b5cad; --good: #e8f3ec; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e6; --back: #16181d; --quiet: #a3a8b0;
  --line: #363a43; --link: #7fb6f0; --good: #1d2b23; } }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 64rem; color: var(--text);
  background: var(--back); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
a { color: var(--link); } .quiet { color: var(--quiet); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
.number { text-align: right; white-space: nowrap; }
.verdict { background: var(--good); padding: .6rem .9rem; border-radius: .3rem; }
.verdict p { margin: .2rem 0; }
figure { margin: 1rem 0; } figure svg, figure img { width: 100%; height: auto; display: block; }
figure img { background: #ffffff; }
.column { max-width: 30rem; }
"""


@dataclass(frozen=True)
class Shown:
    """A figure on the page."""

    kind: FigureKind
    drawn: Drawn


def page(
    title: str,
    *,
    table: str,
    verdicts: Sequence[str],
    figures: Sequence[Shown],
    lacking: Sequence[FigureKind] = (),
    notes: Sequence[str] = (),
) -> str:
    """The whole file as text.

    table: HTML. lacking: figures that these runs have nothing for. notes: sentences below the
    table.
    """
    parts = [
        f'<div class="wide">{table}</div>',
        *(f'<p class="quiet">{escape(note)}</p>' for note in notes),
    ]
    if verdicts:
        lines = "".join(f"<p>{escape(one)}</p>" for one in verdicts)
        parts.append(f'<h2>Verdict</h2>\n<div class="verdict">{lines}</div>')
    parts += [_section(one) for one in figures]
    if lacking:
        items = "".join(
            f"<li><b>{escape(kind.title)}</b> ({escape(kind.name)}): {escape(kind.needs)}</li>"
            for kind in lacking
        )
        parts.append(
            f"<details><summary>{len(lacking)} figures that these runs have nothing for</summary>"
            f"<ul>{items}</ul></details>"
        )
    return document(title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """A whole file around parts of HTML, in the style of the house."""
    head = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # No request for an icon, which a server would be asked for.
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{escape(title)}</h1>",
    ]
    foot = [f'<p class="quiet">fastkd {escape(__version__)}</p>', "</body>", "</html>", ""]
    return "\n".join([*head, *parts, *foot])


def _section(one: Shown) -> str:
    kind, drawn = one.kind, one.drawn
    narrow = drawn.figure.get_figwidth() < 5
    source = f"As {kind.source}. " if kind.source else ""
    links = _link(f"{kind.name}.csv", "text/csv", csv_text(drawn.rows), "numbers as CSV")
    links += ", " + _link(f"{kind.name}.tex", "text/plain", latex_rows(drawn.rows), "as LaTeX")
    return (
        f'<h2 id="{escape(kind.name)}">{escape(kind.title)}</h2>\n'
        f"<figure{' class=column' if narrow else ''}>{_picture(one)}\n"
        f'<figcaption class="quiet">{escape(source)}{links if drawn.rows else ""}</figcaption>'
        "</figure>"
    )


def _link(name: str, kind: str, text: str, words: str) -> str:
    data = base64.b64encode(text.encode()).decode()
    return f'<a download="{escape(name)}" href="data:{kind};base64,{data}">{words}</a>'


def _picture(one: Shown) -> str:
    svg = _svg(one.drawn)
    label = escape(one.kind.title)
    if len(svg) <= _LARGEST:
        return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    file = io.BytesIO()
    with house():
        one.drawn.figure.savefig(file, format="png", dpi=200)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{label}" src="data:image/png;base64,{data}">'


def _svg(drawn: Drawn) -> str:
    """Without a background, and with the page's colour in place of black; sized by the page."""
    file = io.BytesIO()
    axes = drawn.figure.axes
    opaque = [one.patch.get_alpha() for one in axes]
    for one in axes:
        one.patch.set_alpha(0)
    try:
        with house():
            drawn.figure.savefig(
                file, format="svg", facecolor="none", metadata={"Date": None, "Creator": None}
            )
    finally:
        for one, alpha in zip(axes, opaque, strict=True):
            one.patch.set_alpha(alpha)
    text = file.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # Black is also what SVG draws where no colour is named.
    text = text.replace(INK, "currentColor").replace("#000000", "currentColor")
    return text.replace("<svg ", '<svg fill="currentColor" ', 1)
