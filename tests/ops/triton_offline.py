"""Compiles the Triton kernels for real chips without one, and counts what came out.

    python tests/ops/triton_offline.py [--markdown] [sm ...]

Prints one JSON row (or table line) per kernel, case and chip. Needs a process without
TRITON_INTERPRET; the disassemblers come with Triton.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from fastkd.kernels.kd_loss import gpu
from fastkd.kernels.kd_loss.gpu_kernels import forward_kernel as FORWARD
from fastkd.kernels.kd_loss.gpu_kernels import gradient_kernel as GRADIENT
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CHIPS = (80, 90, 100)
POINTERS = {"y_ptr": "*i64", "mask_ptr": "*u8"}
FLOATS = {"temperature", "smoothing", "kd_weight", "ce_weight", "kd_scale", "ce_scale"}
# name: (rows, classes, contiguous classes, storage type)
CASES = {
    "64x100 fp32": (64, 100, True, "fp32"),
    "1024x1000 fp32": (1024, 1000, True, "fp32"),
    "1024x1000 bf16": (1024, 1000, True, "bf16"),
    "1024x21841 bf16": (1024, 21841, True, "bf16"),
    "16x1000000 bf16, split": (16, 1_000_000, True, "bf16"),
    "dense 19 classes bf16": (524288, 19, False, "bf16"),
    "dense 150 classes bf16": (524288, 150, False, "bf16"),
}


def describe(kernel: Any, case: str, extra: dict[str, int | bool]) -> tuple[Any, dict, dict]:
    """Signature, compile-time constants and attributes that a launch of this case would have."""
    _, classes, by_class, storage = CASES[case]
    flags: dict[str, Any] = {
        "TEACHERS": 1, "LABELS": 1, "WEIGHTS": False, "MASK": False, "SMOOTH": False,
        "CLASSES": classes, "ALIGN": min(16, classes & -classes) if by_class else 0,
        "s_c": 1 if by_class else None, "t_c": 1 if by_class else None,
        "g_c": 1 if by_class else None, "s_p": None if by_class else 1,
        "t_p": None if by_class else 1, "g_p": None if by_class else 1, **extra,
    }  # fmt: skip
    flags = {k: v for k, v in flags.items() if v is not None}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in flags or name.isupper():
            signature[name] = "constexpr"
            constants[(place,)] = flags[name]
        elif name.endswith("_ptr"):
            stored = name in ("s_ptr", "t0_ptr", "t1_ptr", "t2_ptr", "t3_ptr", "g_ptr")
            signature[name] = POINTERS.get(name, f"*{storage}" if stored else "*fp32")
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
            # What a launch sees: these numbers of rows, H * W and strides are multiples of 16.
            dense = ("inner", "s_n", "s_c", "t_n", "t_c", "g_n", "g_c")
            if name == "num_rows" or (not by_class and name in dense):
                attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def tool(name: str, *arguments: str) -> str:
    """Output of one of the disassemblers that Triton brings."""
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True).stdout


def compile_case(kernel: Any, case: str, chip: int, warps: int, extra: dict) -> dict[str, Any]:
    """Registers, spills, shared memory and instruction mix of one kernel on one chip."""
    signature, constants, attributes = describe(kernel, case, extra)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
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
    return {
        "kernel": kernel.fn.__name__,
        "case": case,
        "chip": f"sm_{chip}",
        "tile": f"{extra['BLOCK_R']}x{extra['BLOCK_C']}",
        "warps": warps,
        "registers": count["REG"],
        "spills": count["LOCAL"] + sum(op.startswith(("STL", "LDL")) for op in lines),
        "shared": built.metadata.shared,
        "widest_load": max(widths, default=0),
        "loads": len(widths),
        "mufu": sum(op.startswith("MUFU.EX2") for op in lines),
        "instructions": len(lines),
    }


def rows(chips: tuple[int, ...] = CHIPS) -> list[dict[str, Any]]:
    """Every kernel of every case on every chip."""
    found = []
    for case, (num_rows, classes, by_class, _) in CASES.items():
        p = gpu.plan(num_rows, classes, 1 if by_class else 131072)
        forward = {"BLOCK_R": p.block_r, "BLOCK_C": p.block_c, "ONE_TILE": classes <= p.block_c,
                   "SPLITS": triton.next_power_of_2(p.splits), "PER_ROW": False}  # fmt: skip
        gradient = {"BLOCK_R": p.grad_block_r, "BLOCK_C": p.grad_block_c, "KD": True, "CE": True,
                    "DIVISOR": True, "up_kd_step": 0, "up_ce_step": 0}  # fmt: skip
        phases = (1, 2) if p.splits > 1 else (0,)
        for chip in chips:
            found += [
                compile_case(FORWARD, case, chip, p.warps, {**forward, "PHASE": phase})
                for phase in phases
            ]
            found.append(compile_case(GRADIENT, case, chip, p.grad_warps, gradient))
    return found


if __name__ == "__main__":
    wanted = tuple(int(a) for a in sys.argv[1:] if a.isdigit()) or CHIPS
    results = rows(wanted)
    if "--markdown" in sys.argv:
        print("| " + " | ".join(results[0]) + " |\n|" + " --- |" * len(results[0]))
        for row in results:
            print("| " + " | ".join(map(str, row.values())) + " |")
    else:
        print(json.dumps(results))
