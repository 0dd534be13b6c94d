"""What is compiled and when it pays: the teacher and the step, one static graph per batch shape."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch

__all__ = ["CompileChoice", "CompileSwitch", "compile_unit", "worth_compiling"]

CompileSwitch = Literal["on", "off"]
"""Whether torch.compile is used."""

CompileChoice = Literal["auto", CompileSwitch]
"""The same, or `auto`: compile if the run is long enough to pay for it."""

T = TypeVar("T", bound=Callable[..., Any])

# Order-of-magnitude figures on purpose: the decision must be the same on every run of a recipe on
# a machine, or two runs would differ in their last bits, so nothing is timed.
MACS_PER_SECOND = {"cpu": 3e10, "cuda": 1e13}
COMPILE_SECONDS = {"cpu": 40.0, "cuda": 60.0}
PAYS_FROM = 10.0


def worth_compiling(mode: str, *, macs_per_image: float, images: float, device_type: str) -> bool:
    """True for `on`; for `auto` if the projected run is 10 times the expected compile time.

    macs_per_image: multiply-accumulates of a training step per image, forward and backward of the
    student and forward of the teacher. images: over the whole run, all ranks.
    """
    if mode != "auto":
        return mode == "on"
    projected_s = macs_per_image * images / MACS_PER_SECOND[device_type]
    return projected_s >= PAYS_FROM * COMPILE_SECONDS[device_type]


def compile_unit(unit: T, *, enabled: bool, fullgraph: bool = True, cuda_graphs: bool = False) -> T:
    """torch.compile without dynamic shapes, or the unit itself.

    dynamic=False keeps one graph per batch shape; with dynamic shapes the numbers of a resumed
    run would depend on which shape it met first.
    """
    if not enabled:
        return unit
    mode = "reduce-overhead" if cuda_graphs else None
    options: dict[str, Any] = {"dynamic": False, "fullgraph": fullgraph, "mode": mode}
    # All students run the same code, so they would share its limit of 8 graphs, which is meant
    # for one function that keeps changing: the fifth student of a notebook would fail.
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    return torch.compile(unit, **options)  # type: ignore[return-value]
