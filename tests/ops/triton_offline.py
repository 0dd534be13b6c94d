"""Compiles the Triton kernels of an op for real chips without one, and counts what came out.

    python tests/ops/triton_offline.py OP [--markdown] [sm ...]

Prints one JSON row (or table line) per kernel, case and chip. The launches of an op are listed by
`launches()` in triton_cases_<op>.py beside this file; test_triton.py finds the op by that file.
Needs a process without TRITON_INTERPRET; the disassemblers come with Triton.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CHIPS = (80, 90, 100)


@dataclass(frozen=True)
class Launch:
    """One kernel as a launch of one case would specialise it."""

    kernel: Any
    case: str
    warps: int
    constants: Mapping[str, Any]
    """Compile-time constants, the tile among them, and arguments that are 1."""
    types: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """Arguments that are not fp32 pointers (`*_ptr`) or i32 numbers."""
    multiples_of_16: Collection[str] = ()
    """Numbers known to be; pointers are."""
    wide_loads: bool = True
    """Whether 128-bit loads are expected."""
    tile: tuple[str, ...] = ()
    """The constants that are the tile; by default those called BLOCK_*."""
    fp_fusion: bool = True

    def source(self) -> ASTSource:
        """Signature, compile-time constants and attributes for the compiler."""
        signature, constants, attributes = {}, {}, {}
        for place, name in enumerate(self.kernel.arg_names):
            pointer = name.endswith("_ptr")
            if name in self.constants or name.isupper():
                signature[name] = "constexpr"
                constants[(place,)] = self.constants[name]
                continue
            signature[name] = self.types.get(name, "*fp32" if pointer else "i32")
            if pointer or name in self.multiples_of_16:
                attributes[(place,)] = [["tt.divisibility", 16]]
        return ASTSource(
            fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes
        )


def tool(name: str, *arguments: str) -> str:
    """Output of one of the disassemblers that Triton brings."""
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True).stdout


def compile_launch(launch: Launch, chip: int) -> dict[str, Any]:
    """Registers, spills, shared memory and instruction mix of one kernel on one chip."""
    options = {"num_warps": launch.warps, "enable_fp_fusion": launch.fp_fusion}
    built = triton.compile(launch.source(), target=GPUTarget("cuda", chip, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    count = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", code)
    loads = [op for op in lines if op.startswith(("LDG", "LD.E"))]
    bits = {".128": 128, ".64": 64, ".U16": 16, ".U8": 8}
    widths = [next((n for key, n in bits.items() if key in op), 32) for op in loads]
    tile = launch.tile or [name for name in launch.constants if name.startswith("BLOCK_")]
    return {
        "kernel": launch.kernel.fn.__name__,
        "case": launch.case,
        "chip": f"sm_{chip}",
        "tile": "x".join(str(launch.constants[name]) for name in tile),
        "warps": launch.warps,
        "registers": count["REG"],
        "spills": count["LOCAL"] + sum(op.startswith(("STL", "LDL")) for op in lines),
        "shared": built.metadata.shared,
        "widest_load": max(widths, default=0),
        "loads": len(widths),
        "mufu": sum(op.startswith("MUFU.EX2") for op in lines),
        "instructions": len(lines),
    }


def main(op: str, markdown: bool, chips: Collection[int]) -> None:
    """Every launch of an op on every chip."""
    launches = list(import_module(f"triton_cases_{op}").launches())
    rows = [(launch, compile_launch(launch, chip)) for launch in launches for chip in chips]
    if markdown:
        print("| " + " | ".join(rows[0][1]) + " |\n|" + " --- |" * len(rows[0][1]))
        for _, row in rows:
            print("| " + " | ".join(map(str, row.values())) + " |")
    else:
        print(json.dumps([{"row": row, "wide_loads": launch.wide_loads} for launch, row in rows]))


if __name__ == "__main__":
    numbers = tuple(int(a) for a in sys.argv[2:] if a.isdigit())
    main(sys.argv[1], "--markdown" in sys.argv, numbers or CHIPS)
