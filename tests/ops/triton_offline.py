"""Compiles the Triton kernels of an op for real chips without one, and counts what came out.

    python tests/ops/triton_offline.py PART OP ..        JSON: every launch and chip; PART of them
                                                         compiled: all, share or the rest
    python tests/ops/triton_offline.py --write           rewrites docs/kernels.md, all ops

The launches of an op are listed by `launches()` in triton_cases_<op>.py in this folder.
test_triton.py finds the op by that file and keeps docs/kernels.md current. Needs a process without
TRITON_INTERPRET; the disassemblers come with Triton.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CHIPS = (80, 90, 100)
SHARE_CHIP = 90
OPS = ("kd_loss", "hardness", "attention_map", "mix", "grouped_pointwise")
PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
# Bytes per thread. No version of Triton that was tried comes near it; a tile of ours that does not
# fit the registers at all would.
MAX_SPILLED = 4096
# An H200, measured: a copy, read plus written, and a product of bf16 matrices; its datasheet: fp32
# instructions of all lanes.
COPY_BYTES_PER_S, MATRIX_OPS_PER_S, VECTOR_OPS_PER_S = 4.3e12, 790e12, 33e12
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
TILE_NAMES = ("BLOCK_R", "BLOCK_S", "BLOCK_T", "BLOCK_C", "BLOCK_P", "BLOCK_X", "GROUPS", "VEC")
TILE_NAMES += ("BLOCK_K", "BLOCK_N", "ROWS")
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "IMMA")


@dataclass(frozen=True)
class Launch:
    """A launch of one case, as gpu.py makes it."""

    kernel: Any
    case: str
    arguments: Mapping[str, Any]
    """Those of the kernel; tensors need no memory."""
    options: Mapping[str, Any]
    """Of the compiler, `num_warps` among them."""
    moved_bytes: int
    """What the launch has to read and write at least, each element once."""
    operations: int
    """fp32 operations of the formula, an exponential counted as one, without addressing."""
    products: int = 0
    """Operations in products of 16-bit matrices, counted apart from `operations`."""
    wide_loads: bool = True
    """Whether 128-bit loads are expected."""
    representative: bool = False
    """Whether the tests compile it by default, for one chip."""

    def floor_us(self) -> float:
        """No H200 can be faster, the launch itself not counted."""
        by_bytes = self.moved_bytes / COPY_BYTES_PER_S
        by_products = self.products / MATRIX_OPS_PER_S
        return 1e6 * max(by_bytes, by_products, self.operations / VECTOR_OPS_PER_S)

    def chosen(self, chip: int) -> dict[str, Any]:
        """The columns of a row that are ours, not the compiler's."""
        tile = [str(self.arguments[name]) for name in TILE_NAMES if name in self.arguments]
        return {
            "kernel": self.kernel.fn.__name__,
            "case": self.case,
            "chip": f"sm_{chip}",
            "tile": "x".join(tile),
            "warps": self.options["num_warps"],
        }

    def source(self) -> ASTSource:
        """Signature, compile-time constants and attributes, as a launch specialises them."""
        signature, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name] = "constexpr"
                constants[(place,)] = value
            else:
                signature[parameter.name] = specialised((place,), value, constants, attributes)
        return ASTSource(
            fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes
        )


def specialised(path: tuple[int, ...], value: Any, constants: dict, attributes: dict) -> Any:
    """The type of an argument; None and 1 are constants, addresses are multiples of 16."""
    if isinstance(value, tuple):
        return tuple(
            specialised((*path, i), part, constants, attributes) for i, part in enumerate(value)
        )
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"


def launching(gpu: Any) -> list[Any]:
    """The module `gpu`, and those beside it that launch for it."""
    names = [name for name in sys.modules if name.startswith(gpu.__name__)]
    return [sys.modules[name] for name in names if hasattr(sys.modules[name], "launch")]


def recorded(gpu: Any, call: Callable[[], Any]) -> Iterator[tuple[Any, dict, dict]]:
    """The kernels that `call` launches by the module `gpu`: (kernel, arguments, options)."""
    made: list[tuple[Any, dict]] = []

    def record(kernel: Any, grid: tuple[int, ...], on: Tensor, **rest: Any) -> None:
        made.append((kernel, rest))

    with ExitStack() as patches:
        for module in launching(gpu):
            patches.enter_context(patch.object(module, "launch", record))
        call()
    for kernel, rest in made:
        options = {"enable_fp_fusion": True}
        options |= {name: rest[name] for name in rest if name not in kernel.arg_names}
        yield kernel, {name: rest[name] for name in kernel.arg_names}, options


def tool(name: str, *arguments: str) -> str:
    """Output of one of the disassemblers that Triton brings."""
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True).stdout


def compiled(launch: Launch, chip: int) -> dict[str, Any]:
    """Registers, spills, shared memory and instruction mix: the compiler's columns of a row."""
    target = GPUTarget("cuda", chip, 32)
    built = triton.compile(launch.source(), target=target, options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    count = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", code)
    loads, stores = (
        [width(op) for op in lines if op.startswith(names)]
        for names in (("LDG", "LD.E"), ("STG", "ST.E"))
    )
    return {
        "registers": count["REG"],
        "spilled": count["STACK"] + count["LOCAL"],
        "shared": built.metadata.shared,
        "load bits": max(loads, default=0),
        "store bits": max(stores, default=0),
        "loads": len(loads),
        "stores": len(stores),
        "matrix": sum(op.startswith(MATRIX) for op in lines),
        "exp2": sum(op.startswith("MUFU.EX2") for op in lines),
        "instructions": len(lines),
    }


def width(op: str) -> int:
    """Bits of one access of a lane."""
    bits = {".256": 256, ".128": 128, ".64": 64, "16": 16, "8": 8}
    suffixes = op.split(".", 1)[-1]
    return next((n for key, n in bits.items() if suffixes.endswith(key) or f"{key}." in op), 32)


def launches_of(op: str) -> list[Launch]:
    """Those of triton_cases_<op>.py."""
    return list(import_module(f"triton_cases_{op}").launches())


def line(cells: Collection[Any]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def work(launch: Launch) -> str:
    """The line of a launch in the table of bytes and operations."""
    megabytes = launch.moved_bytes / 1e6
    millions = (launch.operations + launch.products) / 1e6
    numbers = [f"{value:.3g}" for value in (megabytes, millions, launch.floor_us())]
    return line([launch.kernel.fn.__name__, launch.case, *numbers])


def page() -> str:
    """docs/kernels.md."""
    parts = [HEAD.format(triton=triton.__version__, bound=MAX_SPILLED)]
    for op in OPS:
        launches = launches_of(op)
        rows = [
            launch.chosen(chip) | compiled(launch, chip) for launch in launches for chip in CHIPS
        ]
        names = ["kernel", "case", "MB", "M operations", "floor us on an H200"]
        parts += [f"\n## {op}\n", line(names), "|" + " --- |" * len(names)]
        parts += list(dict.fromkeys(map(work, launches)))
        parts += ["", line(rows[0]), "|" + " --- |" * len(rows[0])]
        parts += [line(row.values()) for row in rows]
    return "\n".join(parts) + "\n"


HEAD = """# The Triton kernels as compiled

Written by `python tests/ops/triton_offline.py --write` with Triton {triton}. A test compares the
launches with this page under every version of Triton, and the compiler's columns under {triton}.
No GPU was at hand: this is what the compiler makes for three chips, and the least that a launch
has to do. It is not a time.

- MB and operations are per launch: every element that has to be read or written, once, and the
  operations of the formula (an exponential is one). The floor is the largest of MB over the
  4.3 TB/s that a copy reaches on an H200, operations over its 33 T vector operations/s and, in
  products of 16-bit matrices (grouped_pointwise), over its 790 TFLOP/s: `matrix` counts their
  instructions.
- spilled: bytes per thread that did not fit its registers. shared: bytes per program. load bits,
  store bits: the widest access of a lane. exp2: MUFU.EX2. instructions: the whole kernel with all
  its branches. Rows of an odd number of classes (21841) begin at odd addresses and are read in
  narrow loads: pad the classes to a multiple of 8 where that matters.
- Registers and spills differ between versions of Triton, so tests report them (pytest's warnings)
  and fail only above {bound} spilled bytes per thread. Triton 3.6, 3.8 and 3.9 spill at most 16.
  Triton 3.7.1 gives the pooled forward pass of attention_map (16x16 to 8x8) 32 registers and 2 kB
  of spills: use another version on a GPU."""


def found(op: str, is_wanted: Callable[[Launch, int, int], bool]) -> Iterator[dict[str, Any]]:
    """All launches of an op on all chips, those compiled that are wanted."""
    for index, launch in enumerate(launches_of(op)):
        for chip in CHIPS:
            wanted = is_wanted(launch, index, chip)
            yield {
                "chosen": launch.chosen(chip),
                "compiled": compiled(launch, chip) if wanted else None,
                "work": work(launch),
                "operations": launch.operations,
                "bytes": launch.moved_bytes,
                "wide_loads": launch.wide_loads,
            }


PARTS: dict[str, Callable[[Launch, int, int], bool]] = {
    "all": lambda launch, index, chip: True,
    "share": lambda launch, index, chip: launch.representative and chip == SHARE_CHIP,
    # Compiling is most of the time of these tests: each launch for one chip, in turns.
    "turns": lambda launch, index, chip: chip == CHIPS[index % len(CHIPS)],
}

if __name__ == "__main__":
    if sys.argv[1] == "--write":
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page())
    else:
        launches = {op: list(found(op, PARTS[sys.argv[1]])) for op in sys.argv[2:]}
        print(json.dumps({"max_spilled": MAX_SPILLED, "launches": launches}))
