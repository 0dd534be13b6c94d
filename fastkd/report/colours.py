"""Colours of classes, where a set does not bring its own: told apart with any colour vision.

Used by the pictures of a run and by the label maps of `fastkd predict`.
"""

from collections.abc import Sequence

__all__ = ["RGB", "WRONG", "colours_of"]

RGB = tuple[int, int, int]

WRONG: RGB = (213, 94, 0)
"""Of wrong pixels in an error map; no class has it."""

# Okabe and Ito's palette, and shades of Tol's muted one; neighbours differ in lightness too, and so
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
