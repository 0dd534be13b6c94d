"""The launches of `hardness` and `select_hardest` that triton_offline.py compiles."""

from collections.abc import Iterator

import torch
from torch import Tensor
from triton_offline import Launch, recorded

from fastkd.kernels.hardness import gpu

# (kind, rows, classes, dtype)
CASES = [
    ("kl", 128, 100, torch.float32),
    ("kl", 512, 1000, torch.float32),
    ("kl", 512, 1000, torch.bfloat16),
    ("kl", 512, 21841, torch.bfloat16),
    ("entropy", 512, 1000, torch.bfloat16),
    ("entropy", 512, 21841, torch.bfloat16),
    ("cross_entropy", 512, 1000, torch.bfloat16),
    ("margin", 512, 1000, torch.bfloat16),
]
REPRESENTATIVE = (CASES[0], CASES[2], CASES[7])
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Per class: maxima, exponentials, sums, and the terms of the criterion.
OPERATIONS = {"kl": 14, "entropy": 6, "cross_entropy": 4, "margin": 2}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches() -> Iterator[Launch]:
    """Every criterion, and the choice from the largest pool that is ranked."""
    for kind, rows, classes, dtype in CASES:
        logits = empty(rows, classes, dtype=dtype)
        teacher = logits if kind == "kl" else None
        labels = empty(rows, dtype=torch.int64) if kind in ("cross_entropy", "margin") else None

        def score(arguments: tuple = (logits, teacher, labels, kind, 4.0)) -> None:
            gpu.hardness(*arguments)

        ((kernel, arguments, options),) = recorded(gpu, score)
        yield Launch(
            kernel,
            f"{kind} {rows}x{classes} {NAMES[dtype]}",
            arguments,
            options,
            moved_bytes=(2 if kind == "kl" else 1) * dtype.itemsize * rows * classes + 4 * rows,
            operations=OPERATIONS[kind] * rows * classes,
            # An odd number of classes leaves rows at odd addresses.
            wide_loads=classes % 2 == 0,
            representative=(kind, rows, classes, dtype) in REPRESENTATIVE,
        )
    num = gpu.MAX_POOL
    ((kernel, arguments, options),) = recorded(
        gpu, lambda: gpu.select_hardest(empty(num), num // 2)
    )
    yield Launch(
        kernel,
        f"select {num}",
        arguments,
        options,
        moved_bytes=4 * num + 8 * num // 2,
        # Each score against each other: greater, equal, lower index, count.
        operations=4 * num**2,
        representative=True,
    )
