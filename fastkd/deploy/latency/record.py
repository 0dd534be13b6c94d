"""What a latency measurement says: the one schema of its JSON, wherever that was written.

The script for other devices writes plain values (`alone.py`); what fastkd measures itself and what
it reads goes through here.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastkd.deploy.latency.alone import taken
from fastkd.errors import UserError
from fastkd.printable import shown
from fastkd.storage.atomic import atomic_path

__all__ = ["Latency", "LatencyReport", "Layer", "Machine", "Missing", "WarmUp"]

_Text = Annotated[str, Field(max_length=2000)]
_Ms = Annotated[float, Field(ge=0)]
_Count = Annotated[int, Field(ge=0)]
_Some = Annotated[int, Field(ge=1)]


class _Value(BaseModel):
    # A later version may write more.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Layer(_Value):
    """Time of one layer."""

    name: _Text
    """Path of a module, or name of a node."""
    kind: _Text
    ms: _Ms
    """Median of the calls."""
    share: _Ms
    """Of the sum of all layers and what lies between them."""


class Latency(_Value):
    """How long a call takes on one backend."""

    on: _Text
    """Name of the backend."""
    input: Annotated[tuple[_Some, ...], Field(min_length=1)]
    """Shape, the batch first."""
    threads: _Some
    p10_ms: _Ms
    p50_ms: _Ms
    p90_ms: _Ms
    calls: _Some
    """Timed calls."""
    warm_up_calls: _Count
    warm_up_s: _Ms
    steady: bool
    """Whether the warm-up ended because the times had become steady."""
    difference: float | None = None
    """Largest difference from the reference's answer, as a share of its largest |value|."""
    layers: tuple[Layer, ...] = ()
    """Slowest first, if they were asked for."""
    layers_by: _Text | None = None
    """How the layers were timed."""


class Missing(_Value):
    """What was not measured."""

    on: _Text
    batch: _Some | None = None
    threads: _Some | None = None
    reason: _Text
    wrong: bool = False
    """Whether it failed, such as by a wrong answer; otherwise something is not there."""


class Machine(_Value):
    """Where it was measured; None is not known."""

    cpu: _Text
    cores: _Some
    system: _Text
    virtual: bool | None = None
    governor: _Text | None = None
    max_mhz: int | None = None
    turbo: bool | None = None
    mains: bool | None = None
    throttled: int | None = None
    """Times that the processor's heat slowed it down since it was started."""


class WarmUp(_Value):
    """`Rule` of `meter.py`."""

    window_calls: _Count
    window_s: _Ms
    tolerance: _Ms
    warm_up_s: _Ms
    calls: _Count
    seconds: _Ms


class LatencyReport(_Value):
    """All that one command measured."""

    format: Literal["fastkd latency 1"]
    network: _Text
    reference: _Text | None = None
    """Whose answers were the right ones."""
    clock: _Text
    rule: WarmUp
    machine: Machine
    versions: dict[str, _Text]
    time: _Text
    rows: tuple[Latency, ...]
    missing: tuple[Missing, ...] = ()
    caveats: tuple[_Text, ...] = ()

    @classmethod
    def read(cls, file: Path) -> Self:
        """From a JSON file of `fastkd latency` or its script. UserError if it is none."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
            raise UserError(f"{shown(file)} cannot be read: {reason}") from error
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(
                f"{shown(file)} was not written by fastkd latency or its script: "
                f"{place}: {first['msg']}"
            ) from error

    def write(self, file: Path) -> None:
        """As JSON, whole or not at all. UserError if there is such a file."""
        if reason := taken(file):
            raise UserError(reason)
        with atomic_path(file) as beside:
            beside.write_text(json.dumps(self.plain(), indent=1) + "\n", encoding="utf-8")

    def plain(self) -> dict[str, Any]:
        """Plain values, as they are in the JSON."""
        return self.model_dump(mode="json")
