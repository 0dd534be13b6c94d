"""Colours of curves and of classes: told apart with any colour vision, and in greyscale.

Used by all plots of runs, by the pictures of a run and by the label maps of `fastkd predict`.
"""

from collections.abc import Sequence
from typing import TypedDict

__all__ = ["INK", "QUIET", "RGB", "WRONG", "Look", "colours_of", "look_of"]

INK = "#1a1a1a"
"""Text and axes; a page that is shown dark replaces it."""
QUIET = "#757575"
"""Reference lines, and marks that are not the subject: seen on white and on black."""

# Okabe and Ito's palette, which is safe for all common kinds of colour blindness; line styles and
# markers keep series distinct in greyscale print.
_SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


class Look(TypedDict):
    """Keyword arguments of a line in matplotlib."""

    color: str
    linestyle: str
    marker: str


def look_of(index: int) -> Look:
    """Colour, line style and marker of a series. Two agree in all three after 56."""
    return {
        "color": _SERIES[index % len(_SERIES)],
        "linestyle": _STYLES[index % len(_STYLES)],
        "marker": _MARKERS[index % len(_MARKERS)],
    }


RGB = tuple[int, int, int]

WRONG: RGB = (213, 94, 0)
"""Of wrong pixels in an error map; no class has it."""

# The same palette, and shades of Tol's muted one; neighbours differ in lightness too, and so
# stay apart in greyscale.
_SAFE: tuple[RGB, ...] = (
    (0, 114, 178),
    (240, 228, 66),
    (0, 158, 115),
    (86, 180, 233),
    (204, 121, 167),
    (51, 34, 136),
    (230, 159, 0),
    (0, 0, 0),
    (153, 221, 255),
    (136, 34, 85),
    (187, 204, 51),
    (102, 102, 102),
    (255, 170, 187),
    (17, 119, 51),
    (204, 204, 204),
)


def colours_of(num_classes: int, palette: Sequence[RGB] | None = None) -> list[RGB]:
    """A colour for every class id: the palette's, then of the safe ones those it does not use.

    Beyond these they come again, each time darker by a third.
    """
    colours = list(palette or ())[:num_classes]
    dimming = 1.0
    while len(colours) < num_classes:
        shades = [_dimmed(colour, dimming) for colour in _SAFE]
        colours += [shade for shade in shades if dimming < 0.1 or shade not in colours]
        dimming *= 2 / 3
    return colours[:num_classes]


def _dimmed(colour: RGB, factor: float) -> RGB:
    red, green, blue = colour
    return round(red * factor), round(green * factor), round(blue * factor)
