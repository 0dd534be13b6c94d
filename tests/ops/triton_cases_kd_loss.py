"""The launches of `kd_loss` that triton_offline.py compiles."""

from collections.abc import Iterator
from typing import Any

import triton
from fastkd.kernels.kd_loss.gpu import plan
from fastkd.kernels.kd_loss.gpu_kernels import forward_kernel, gradient_kernel
from triton_offline import Launch

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
NUMBERS = ("temperature", "smoothing", "kd_weight", "ce_weight", "kd_scale", "ce_scale")


def launches() -> Iterator[Launch]:
    """Forward pass (in two phases where rows are split) and gradient of each case."""
    for case, (rows, classes, by_class, storage) in CASES.items():
        p = plan(rows, classes, 1 if by_class else 131072)
        logits = [f"{name}_ptr" for name in ("s", "t0", "t1", "t2", "t3", "g")]
        types = dict.fromkeys(NUMBERS, "fp32") | {"y_ptr": "*i64", "mask_ptr": "*u8"}
        types |= dict.fromkeys(logits, f"*{storage}")
        ones = "c" if by_class else "p"
        constants: dict[str, Any] = {
            "TEACHERS": 1, "LABELS": 1, "WEIGHTS": False, "MASK": False, "SMOOTH": False,
            "CLASSES": classes, "ALIGN": min(16, classes & -classes) if by_class else 0,
            **{f"{tensor}_{ones}": 1 for tensor in "stg"},
        }  # fmt: skip
        # What a launch sees: these numbers of rows, H * W and strides are multiples of 16.
        dense = ("inner", *(f"{tensor}_{axis}" for tensor in "stg" for axis in "nc"))
        common = {
            "types": types,
            "multiples_of_16": ("num_rows", *(() if by_class else dense)),
            # An odd number of classes leaves rows at odd addresses.
            "wide_loads": classes % 2 == 0 or not by_class,
        }
        forward = {"BLOCK_R": p.block_r, "BLOCK_C": p.block_c, "ONE_TILE": classes <= p.block_c,
                   "SPLITS": triton.next_power_of_2(p.splits), "PER_ROW": False}  # fmt: skip
        gradient = {"BLOCK_R": p.grad_block_r, "BLOCK_C": p.grad_block_c, "KD": True, "CE": True,
                    "DIVISOR": True, "up_kd_step": 0, "up_ce_step": 0}  # fmt: skip
        elements, size = rows * classes, 2 if storage == "bf16" else 4
        # Labels, six statistics of a row; of a split row 11 numbers from each program.
        row_bytes = rows * (8 + 6 * 4)
        for phase in (1, 2) if p.splits > 1 else (0,):
            phased = constants | forward | {"PHASE": phase}
            parts = 11 * 4 * rows * p.splits if phase else 0
            moved = parts + row_bytes + (0 if phase == 2 else 2 * size * elements)
            # Per class: 2 scalings, 3 maxima, 3 exponentials, 5 sums, 4 for the logarithm, argmax.
            operations = 11 * rows * p.splits if phase == 2 else 19 * elements
            yield Launch(
                forward_kernel, case, p.warps, phased, moved_bytes=moved, operations=operations,
                **common,
            )  # fmt: skip
        # Per class: 3 exponentials with their scaling, the differences and the upstream.
        yield Launch(
            gradient_kernel, case, p.grad_warps, constants | gradient, operations=11 * elements,
            moved_bytes=3 * size * elements + row_bytes, **common,
        )  # fmt: skip
