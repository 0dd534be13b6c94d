"""Which implementation runs: opens the C++ core, owns the torch library, answers `status()`.

An op registers a schema, a fake and one implementation per dispatch key; the key of the tensors
then picks the backend. Where a device has none, the op's plain torch reference runs instead.
"""

import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "LIBRARY",
    "STORAGE",
    "Arguments",
    "Core",
    "Impl",
    "attach",
    "choose",
    "choose_for",
    "core",
    "entry_point",
    "is_exporting",
    "is_plain_cpu",
    "status",
    "triton_reason",
]

Impl = Literal["reference", "cpp", "triton"]
_IMPLS: tuple[str, ...] = get_args(Impl)

LIBRARY = torch.library.Library("fastkd", "DEF")

# Numbers by which the C++ core knows dtypes: `Storage` in csrc/storage.h.
STORAGE = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.uint8: 4,
}

_CORE_FILE = Path(__file__).with_name("libfastkd_cpu.so")


@dataclass(frozen=True)
class Core:
    """The opened C++ core. `isas`: the instruction sets this machine supports, widest first."""

    library: ctypes.CDLL
    isas: tuple[str, ...]
    threads: str
    """Whose thread pool it runs on: the OpenMP runtime's file name, or "one thread"."""


@functools.cache
def core() -> Core | str:
    """The C++ core, or one sentence that says why there is none."""
    if not _CORE_FILE.exists():
        return (
            "C++ core not built: libfastkd_cpu.so is missing. Install a C++17 compiler, then run "
            "`pip install -e .` again (-v shows the build)"
        )
    try:
        library = ctypes.CDLL(str(_CORE_FILE))
        if not _built_from_these_sources(library):
            return (
                "C++ core not used: libfastkd_cpu.so was built from other sources than these. Run "
                "`pip install -e .` again"
            )
        library.fastkd_isas.restype = ctypes.c_char_p
        isas = tuple(library.fastkd_isas().decode().split())
        runtime, name = _openmp_of_torch()
        library.fastkd_use_openmp(runtime)
    except (OSError, AttributeError) as error:
        return f"C++ core not usable: {error}. Run `pip install -e .` again"
    return Core(library, isas, name)


def _built_from_these_sources(library: ctypes.CDLL) -> bool:
    """Whether CMake compiled the C++ files in this folder, if there are any.

    Updating a checkout changes the sources but not the library, which would then misread its
    arguments. CMakeLists.txt computes the same digest.
    """
    folder = _CORE_FILE.parent
    found = (file for kind in ("*.cpp", "*.h") for file in folder.rglob(kind))
    files = sorted(file.relative_to(folder).as_posix() for file in found)
    if not files:
        return True
    digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files]
    library_digest = getattr(library, "fastkd_sources", None)
    if library_digest is None:
        return False
    library_digest.restype = ctypes.c_char_p
    return library_digest().decode() == hashlib.sha256("".join(digests).encode()).hexdigest()


class Arguments:
    """The packed argument of a C function: the fields of its struct by name, in its order.

    A field is 8 bytes wide, or several in a row ("4q"), so that there is no padding:
    "P" is a pointer given as a tensor, or None for null; "Q" one given as an address; "q" an
    integer; "d" a double.
    """

    pack: Callable[..., bytes]
    """Takes every field by its name; several in a row are given as a sequence."""

    def __init__(self, **fields: str) -> None:
        self.fields = fields
        layout = struct.Struct("".join(fields.values()))
        self.num_bytes = layout.size
        """The size that the struct must have."""
        values = []
        for name, kind in fields.items():
            if kind == "P":
                values.append(f"0 if {name} is None else {name}.data_ptr()")
            else:
                values.append(f"*{name}" if len(kind) > 1 else name)
        # Written out, as dataclasses do: a loop over names takes as long as a small kernel.
        code = f"lambda *, {', '.join(fields)}: pack({', '.join(values)})"
        self.pack = eval(code, {"pack": layout.pack})


@functools.cache
def entry_point(op: str, arguments: Arguments, isa: str | None = None) -> Callable[[bytes], int]:
    """The C function `op`, which takes packed `arguments`; `isa` picks a clone, not the widest.

    Raises:
        RuntimeError: no C++ core, or its struct differs in size from the arguments.
    """
    found = core()
    if not isinstance(found, Core):
        raise RuntimeError(found)
    isa = isa or found.isas[0]
    num_bytes = found.library[f"fastkd_{op}_bytes_{isa}"]
    num_bytes.argtypes, num_bytes.restype = [], ctypes.c_int64
    if num_bytes() != arguments.num_bytes:
        raise RuntimeError(
            f"{op}: the C++ core takes {num_bytes()} bytes of arguments and Python packs "
            f"{arguments.num_bytes}; expected the same fields in the struct of the op's C++ and in "
            "its cpu.py"
        )
    function = found.library[f"fastkd_{op}_{isa}"]
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
    return function


def _openmp_of_torch() -> tuple[ctypes.c_void_p, str]:
    """Address of GOMP_parallel in the OpenMP runtime that torch has already loaded.

    Sharing the runtime shares its threads: two pools would spin against each other.
    """
    maps = Path("/proc/self/maps")
    text = maps.read_text() if maps.exists() else ""
    files = dict.fromkeys(re.findall(r"(/\S*lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*)", text))
    # Other packages (scikit-learn) bring copies of their own: torch's comes first.
    for file in sorted(files, key=lambda name: "/torch/" not in name):
        symbol = getattr(ctypes.CDLL(file), "GOMP_parallel", None)
        if symbol is not None:
            return ctypes.cast(symbol, ctypes.c_void_p), Path(file).name
    return ctypes.c_void_p(None), "one thread"


@functools.cache
def triton_reason() -> str | None:
    """Why the Triton kernels cannot run on a GPU here, or None. Asks no device."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    given = os.environ.get("CC")
    names = (given.split()[0],) if given and given.split() else ("gcc", "clang")
    if not any(map(shutil.which, names)) and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton needs a C compiler and finds none ({' or '.join(names)}); install gcc"
    return None


_OPS: dict[str, dict[str, Impl]] = {}


def attach(
    op: str,
    folder: str,
    operators: Mapping[str, str],
    adapt: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> None:
    """Attach the functions of a folder's cpu.py and gpu.py to operators of the torch library.

    Args:
        op: the name in `status()`.
        folder: where the functions are, below `fastkd.kernels`.
        operators: the operator that each function implements; names are the same in both modules.
        adapt: wraps a function so that it takes the operator's arguments; None: it does already.
    """
    backends: dict[str, Impl] = {}
    adapt = adapt or (lambda function: function)
    if isinstance(core(), Core):
        module = importlib.import_module(f"{__package__}.{folder}.cpu")
        for function, operator in operators.items():
            LIBRARY.impl(operator, adapt(getattr(module, function)), "CPU")
        backends["cpu"] = "cpp"
    if triton_reason() is None:
        for function, operator in operators.items():
            launcher = _deferred(f"{__package__}.{folder}.gpu", function)
            LIBRARY.impl(operator, adapt(launcher), "CUDA")
        backends["cuda"] = "triton"
    _OPS[op] = backends


def _deferred(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported at the first call, as it imports Triton."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments)

    return call


def choose(op: str, device_type: str, impl: Impl | None) -> Impl:
    """The implementation that runs `op` on a device type: the default, or `impl` if it can."""
    if impl is None:
        return _OPS[op].get(device_type, "reference")
    if impl not in _IMPLS:
        raise ValueError(f"{op}: impl={impl!r} is not one of {', '.join(_IMPLS)} or None")
    if impl == "cpp" and (device_type != "cpu" or isinstance(core(), str)):
        found = core()
        why = (
            found if isinstance(found, str) else f"the tensors are on {device_type!r}, not on 'cpu'"
        )
        raise ValueError(f"{op}: impl='cpp' cannot run: {why}")
    if impl == "triton" and triton_reason() is not None:
        raise ValueError(f"{op}: impl='triton' cannot run: {triton_reason()}")
    return impl


def choose_for(op: str, tensors: Sequence[Tensor], impl: Impl | None) -> Impl:
    """`choose` by the tensors' device and dtypes, and by whether torch.func is at work."""
    picked = choose(op, tensors[0].device.type, impl)
    if picked == "triton" and any(x.dtype == torch.float64 for x in tensors):
        if impl == "triton":
            raise ValueError(f"{op}: impl='triton' takes fp32, bf16 and fp16, not fp64")
        return "reference"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        # vmap, torch.func.grad and jvp pass through plain torch code only.
        if impl not in (None, "reference"):
            raise ValueError(f"{op}: impl={impl!r} cannot run under torch.func; use None")
        return "reference"
    return picked


def is_exporting() -> bool:
    """Whether torch.export is at work (in its default mode, which does not use the compiler).

    torch 2.11 answers yes inside every compilation, where gradients would then be lost.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain_cpu(tensors: Sequence[Tensor]) -> bool:
    """Whether the dispatcher would only call the CPU kernel, because nothing rewrites the call.

    Calling the kernel directly then saves some 10 us, as much as a small batch or image takes;
    torch's profiler does not name such calls.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for x in tensors:
        if type(x) not in _PLAIN or not x.is_cpu or x.is_neg() or x._is_zerotensor():
            return False
    return True


def status() -> dict[str, dict[str, str]]:
    """What runs where: op -> {"cpu": ..., "cuda": ..., "reason": why a slower path runs}.

    For example `{"kd_loss": {"cpu": "c++ (avx2)", "cuda": "triton", "reason": ""}}`.
    """
    found = core()
    table = {}
    for op, backends in sorted(_OPS.items()):
        reasons = []
        row = {"cpu": "reference", "cuda": "reference"}
        if backends.get("cpu") == "cpp" and isinstance(found, Core):
            row["cpu"] = f"c++ ({found.isas[0]})"
        elif isinstance(found, str):
            row["cpu"] = f"reference ({found})"
            reasons.append(found)
        if backends.get("cuda") == "triton":
            row["cuda"] = "triton"
        elif (reason := triton_reason()) is not None:
            row["cuda"] = f"reference ({reason})"
            reasons.append(reason)
        table[op] = {**row, "reason": "; ".join(reasons)}
    return table
