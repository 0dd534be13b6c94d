"""What is compiled, when it pays, and whether it works here: one static graph per batch shape.

torch.compile needs what torch does not bring: a C++ compiler on a CPU, a C compiler for Triton's
launchers on a GPU, a folder to write to. `compiler_problem` tries it before anything is trained.
"""

import functools
import inspect
import logging
import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from fastkd.compute.collectives import first_of_ranks
from fastkd.compute.ranks import World
from fastkd.errors import UserError
from fastkd.printable import first_line

__all__ = [
    "CompileChoice",
    "CompileReason",
    "CompileSwitch",
    "compile_unit",
    "compiler_folder_problem",
    "compiler_problem",
    "compiler_works",
    "drop_unusable_cache_folder",
    "not_compiled",
    "worth_compiling",
]

CompileSwitch = Literal["on", "off"]
"""Whether torch.compile is used."""

CompileChoice = Literal["auto", CompileSwitch]
"""The same, or `auto`: compile if the run is long enough to pay for it."""

CompileReason = Literal["auto", "key", "checkpoint"]
"""Who wants a run compiled: nobody, it only pays; compile=on; or the beginning of a resumed run."""

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


# On a machine with nvcc and no GPU torch's compiler warns of the missing GPU in every run.
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: "No CUDA runtime is found" not in record.getMessage()
)


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


def compiler_works(
    world: World, reason: CompileReason, say: Callable[[str], None], *, key: str = "compile"
) -> bool:
    """Whether torch.compile works on every rank, all of which must call this.

    False is said in one line through `say`; UserError if the run must be compiled, by `key`.
    """
    problem = first_of_ranks(compiler_problem(world.device.type), world)
    if problem is not None:
        say(not_compiled(problem, reason, key=key))
    return problem is None


def not_compiled(problem: str, reason: CompileReason, *, key: str = "compile") -> str:
    """A note that a run is not compiled; UserError if it must be. problem: why, and its cure."""
    if reason == "key":
        raise UserError(f"{key}=on, but {problem}, or set {key}=off")
    if reason == "checkpoint":
        raise UserError(
            f"this run was compiled when it began, and without compiling it would go on with "
            f"other numbers, but {problem}"
        )
    return f"note: this run is not compiled: {problem}"


@functools.cache
def compiler_problem(device_type: str) -> str | None:
    """Why torch.compile cannot be used here and what to do about it, or None; found by trying it.

    Takes some seconds, most of them to import what a compiled run needs as well.
    """
    if problem := compiler_folder_problem():
        return problem
    # Inductor keeps what it has compiled: another compiler must be tried anew.
    factor = _fingerprint_of_compilers()

    def tiny(x: torch.Tensor) -> torch.Tensor:
        return x * factor + 1.0

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(tiny, dynamic=False, fullgraph=True)(torch.ones(8, device=device_type))
    except Exception as error:  # a broken tool chain fails in as many ways as it has tools
        wanted, variable = ("gcc", "CC") if device_type == "cuda" else ("g++", "CXX")
        return (
            f"torch.compile does not work here ({_reason(error)}): install {wanted}, or name a "
            f"working compiler in {variable}"
        )
    return None


@functools.cache
def compiler_folder_problem() -> str | None:
    """Why torch.compile cannot keep what it compiles, or None; the answer stays the first one."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    place = Path(folder or tempfile.gettempdir())
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        variable = "TORCHINDUCTOR_CACHE_DIR" if folder else "TMPDIR"
        return (
            f"torch.compile cannot write to {place} ({error.strerror}): set {variable} to a folder "
            f"that can be written"
        )


def drop_unusable_cache_folder() -> None:
    """Take a folder that cannot be written out of the environment.

    torch makes it even in runs that are not compiled, as soon as they have an optimizer, and fails
    there.
    """
    if compiler_folder_problem() is not None:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)


def _fingerprint_of_compilers() -> float:
    """A number in 0..1 that changes with the compilers that torch would call."""
    facts: list[Any] = []
    for variable, usual in (("CXX", "g++"), ("CC", "gcc")):
        name = os.environ.get(variable) or usual
        found = shutil.which(name.split()[0])
        facts += [name, found]
        if found:
            status = os.stat(found)
            facts += [os.path.realpath(found), status.st_size, status.st_mtime_ns]
    return zlib.crc32(repr(facts).encode()) / 2**32


def _reason(error: BaseException) -> str:
    """The line of a compiler's output, or of an error's message, that says what is wrong."""
    text = str(error)
    if "InvalidCxxCompiler" in text:
        return f"no working C++ compiler: {os.environ.get('CXX') or 'g++'}"
    said = next((line for line in text.splitlines() if "error:" in line), None)
    return first_line(said or error, 200)
