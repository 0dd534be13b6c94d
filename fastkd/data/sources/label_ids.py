"""From the numbers in a label map's file to class ids: one table for a set, applied once.

A label map is read as it is stored: 8-bit grey, or the indices of a palette, whose colours are for
viewers. It is never converted or blended. Every number that is no class becomes NO_CLASS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastkd.errors import UserError
from fastkd.printable import few

__all__ = ["NO_CLASS", "LabelIds"]

NO_CLASS = 255
"""A pixel without a label in a uint8 label map; on the device it is `NO_LABEL`."""
MOST_CLASSES = 255

_ONE_CHANNEL = ("L", "P", "1")
_LOSSY = ("JPEG", "MPO", "WEBP")


@dataclass(frozen=True)
class LabelIds:
    """Which class a number in a file, or a colour, stands for.

    table   256 bytes: the class id of each number, or NO_CLASS
    known   256 bytes: 1 for each number that a file of the set may hold
    colours (red, green, blue) -> class id or NO_CLASS, for files that show classes as colours; ()
            if they hold numbers
    """

    table: bytes
    known: bytes
    colours: tuple[tuple[tuple[int, int, int], int], ...] = ()

    @classmethod
    def of(
        cls,
        classes: Sequence[int],
        ignored: Sequence[int] = (NO_CLASS,),
        colours: Sequence[tuple[int, int, int]] = (),
    ) -> "LabelIds":
        """classes: the number of each class id; ignored: numbers that are no class.

        colours: of the numbers 0, 1, .. in files that show colours.
        """
        table, known = bytearray([NO_CLASS] * 256), bytearray(256)
        for id, number in enumerate(classes):
            table[number], known[number] = id, 1
        for number in ignored:
            known[number] = 1
        of_colours = tuple((colour, table[number]) for number, colour in enumerate(colours))
        return cls(bytes(table), bytes(known), of_colours)

    @property
    def facts(self) -> bytes:
        """All that decides about classes, for a digest."""
        return self.table + self.known + repr(self.colours).encode()

    def map_of(self, image: Image.Image) -> np.ndarray:
        """Class ids of an opened label map, uint8 [H, W].

        Raises:
            UserError: numbers or colours that the set does not have, more than 8 bits, or a format
                that changes numbers; without the file's name, which the caller adds.
        """
        if image.format in _LOSSY:
            raise UserError(
                f"it is {image.format} by its content, whatever its name says, which changes the "
                f"numbers at every edge: save the label map as PNG, from where it was made"
            )
        if image.mode == "L" and any(";" in str(tile[-1]) for tile in getattr(image, "tile", ())):
            # Pillow would stretch 0..15 to 0..255.
            raise UserError(
                "it has fewer than 8 bits for a grey pixel, which some programs stretch and others "
                "do not: save it as 8-bit grey, or with a palette"
            )
        if image.mode in _ONE_CHANNEL:
            return self._looked_up(image)
        if image.mode in ("RGB", "RGBA") and self.colours:
            return self._of_colours(image)
        raise UserError(_refused(image))

    def _looked_up(self, image: Image.Image) -> np.ndarray:
        numbers_HW = np.asarray(image).astype(np.uint8, copy=False)
        if image.mode == "1":
            found = np.unique(numbers_HW).tolist()
        else:
            found = [number for number, count in enumerate(image.histogram()) if count]
        wrong = [number for number in found if not self.known[number]]
        if wrong:
            raise UserError(f"it holds {few(map(str, wrong))}, and {self._expected()}")
        if image.mode == "P":
            self._check_palette(image, found)
        return np.frombuffer(self.table, np.uint8)[numbers_HW]

    def _check_palette(self, image: Image.Image, found: list[int]) -> None:
        """UserError if numbers are in the colours of other classes: one of both means no class."""
        stored = image.getpalette() or []
        named = dict(self.colours)
        for number in found:
            entry = stored[3 * number : 3 * number + 3]
            if len(entry) < 3:  # a palette need not reach to the last number
                continue
            own, colour = self.table[number], (entry[0], entry[1], entry[2])
            if own != NO_CLASS and named.get(colour, own) != own:
                other = [one for one, _ in self.colours].index(colour)
                raise UserError(
                    f"its palette has the colour {','.join(map(str, colour))} at number {number}, "
                    f"and the file of classes gives that colour to number {other}: numbers are "
                    f"what counts, so save it with those of the file of classes, or in RGB, which "
                    f"is read by colour"
                )

    def _of_colours(self, image: Image.Image) -> np.ndarray:
        pixels_HWC = np.asarray(image)[..., :3].astype(np.int32)
        keys_HW = (pixels_HWC[..., 0] << 16) | (pixels_HWC[..., 1] << 8) | pixels_HWC[..., 2]
        keys = np.array([(r << 16) | (g << 8) | b for (r, g, b), _ in self.colours], np.int32)
        ids = np.array([id for _, id in self.colours], np.uint8)
        order = np.argsort(keys)
        places_HW = np.searchsorted(keys[order], keys_HW).clip(max=len(keys) - 1)
        unknown_HW = keys[order][places_HW] != keys_HW
        if unknown_HW.any():
            colours = {tuple(one) for one in pixels_HWC[unknown_HW][:10_000].tolist()}
            raise UserError(
                f"it holds colours that the file of classes does not name "
                f"({few(','.join(map(str, one)) for one in sorted(colours))}): add them, or name "
                f"them ignore"
            )
        return ids[order][places_HW]

    def _expected(self) -> str:
        classes = max(id for id in self.table if id != NO_CLASS) + 1
        numbers = [n for n in range(256) if self.known[n] and self.table[n] != NO_CLASS]
        ignored = [n for n in range(256) if self.known[n] and self.table[n] == NO_CLASS]
        span = f"{numbers[0]} to {numbers[-1]}"
        also = f", and {few(map(str, ignored))} for no class" if ignored else ""
        return f"the set has {classes} classes, numbered from {span}{also}"


def _refused(image: Image.Image) -> str:
    wanted = "a label map holds a class number of 8 bits for each pixel, in one channel"
    if image.mode.startswith(("I", "F")):
        return (
            f"it has more than 8 bits a pixel (mode {image.mode}), and {wanted}: save it as 8-bit "
            "grey"
        )
    return (
        f"it holds colours or several channels (mode {image.mode}), and {wanted}: save the class "
        "numbers as an 8-bit grey or palette PNG, or with data.name=pairs give each class its "
        "colour in data.classes_file (NAME,RED,GREEN,BLUE)"
    )
