"""What a student shall cost at most: `latency=5ms`, `latency=0.5x`, `macs=0.3x`, `params=1M`."""

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from fastkd.errors import UserError
from fastkd.printable import shown

__all__ = ["Quantity", "Target", "amount"]

Quantity = Literal["latency", "macs", "params"]

EXAMPLES = "latency=5ms, latency=0.5x (half of the original's), macs=0.3x or params=1M"
_NUMBER = r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_UNITS: dict[str, dict[str, float]] = {
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3},
    "macs": {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
    "params": {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
}


@dataclass(frozen=True)
class Target:
    """An upper limit: milliseconds of a call, multiply-accumulates of an image, or parameters."""

    quantity: Quantity
    value: float
    share: bool
    """Whether `value` is a share of the original."""

    @classmethod
    def parse(cls, text: str) -> "Target":
        """From the words of the command. UserError for anything else."""
        name, _, wanted = text.partition("=")
        if name not in get_args(Quantity):
            raise UserError(f"--target {shown(text)}: expected {EXAMPLES}")
        match = re.fullmatch(f"{_NUMBER}([A-Za-z]*)", wanted)
        units = _UNITS[name]
        if not match or match[2] not in (*units, "x"):
            known = ", ".join(unit for unit in (*units, "x") if unit)
            raise UserError(
                f"--target {shown(text)}: expected a number with one of {known} behind it, as in "
                f"{EXAMPLES}"
            )
        number = float(match[1])
        share = match[2] == "x"
        if number <= 0 or (share and number >= 1):
            range_ = "between 0x and 1x, a share of the original" if share else "above 0"
            raise UserError(f"--target {shown(text)}: expected a value {range_}")
        quantity: Quantity = name  # type: ignore[assignment]
        value = number if share else number * units[match[2]]
        if math.isinf(value):
            raise UserError(f"--target {shown(text)}: expected a smaller number, as in {EXAMPLES}")
        return cls(quantity, value, share)

    def limit(self, original: float) -> float:
        """The most that is allowed, where the original costs so much."""
        return self.value * original if self.share else self.value

    def words(self, cost: float) -> str:
        """A cost of this kind with its unit."""
        if self.quantity == "latency":
            return f"{cost:.4g} ms"
        return f"{amount(cost)} {'MACs' if self.quantity == 'macs' else 'parameters'}"

    def __str__(self) -> str:
        if self.share:
            return f"{self.quantity}={self.value:g}x"
        return f"{self.quantity} of {self.words(self.value)}"


def amount(number: float) -> str:
    """`1.23 M`."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"
