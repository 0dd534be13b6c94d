"""The launches of `attention_map` that triton_offline.py compiles, as gpu.py makes them."""

from collections.abc import Iterator

import torch
from torch import Tensor
from triton_offline import Launch, recorded

from fastkd.kernels.attention_map import gpu

NCHW, LAST = torch.contiguous_format, torch.channels_last
# name: (student, teacher, dtype, layout, whether 128-bit loads are expected)
CASES = {
    "128 x 32 vs 128 x 32x32 fp32": ((128, 32, 32), (128, 128, 32), torch.float32, NCHW, True),
    "128 x 32 vs 128 x 32x32 bf16": ((128, 32, 32), (128, 128, 32), torch.bfloat16, NCHW, True),
    "the same, channels-last": ((128, 32, 32), (128, 128, 32), torch.bfloat16, LAST, True),
    "32 x 256 vs 256 x 56x56 bf16": ((32, 256, 56), (32, 256, 56), torch.bfloat16, NCHW, True),
    "64 x 512 vs 2048 x 7x7 bf16": ((64, 512, 7), (64, 2048, 7), torch.bfloat16, NCHW, False),
    "64 x 64 x 8x8 vs 128 x 16x16 bf16": ((64, 64, 8), (64, 128, 16), torch.bfloat16, NCHW, True),
}
MAP_ALONE = "map of 64 x 64 x 8x8 bf16"
REPRESENTATIVE = ("128 x 32 vs 128 x 32x32 fp32", "the same, channels-last")


def launches() -> Iterator[Launch]:
    """Forward pass (in two phases where samples are split) and gradient of each case."""
    for case, (*shapes, dtype, layout, wide_loads) in CASES.items():
        student, teacher = (
            torch.empty(n, c, size, size, dtype=dtype, device="meta").to(memory_format=layout)
            for n, c, size in shapes
        )
        pixels, side = student[0, 0].numel(), teacher.shape[2] // student.shape[2]

        def both(student=student, teacher=teacher, window=(side, side)) -> None:
            _, coefficients, _ = gpu.loss(student, teacher, 2, (1, 1), window, 1e-12, False)
            gpu.energy_grad(student, coefficients, torch.empty((), device="meta"), 2, (1, 1))

        for kernel, arguments, options in recorded(gpu, both):
            moved, operations = least(arguments.get("PHASE"), student, teacher, pixels)
            yield Launch(
                kernel,
                case,
                arguments,
                options,
                moved_bytes=moved,
                operations=operations,
                wide_loads=wide_loads,
                representative=case in REPRESENTATIVE,
            )
    ((kernel, arguments, options),) = recorded(gpu, lambda: gpu.energy(student, 2, (1, 1)))
    moved = student.element_size() * student.numel() + 4 * len(student) * pixels
    yield Launch(
        kernel,
        MAP_ALONE,
        arguments,
        options,
        moved_bytes=moved,
        operations=2 * student.numel(),
        representative=True,
    )


def least(phase: int | None, student: Tensor, teacher: Tensor, pixels: int) -> tuple[int, int]:
    """Bytes to move and operations of the forward pass in a phase, or of the gradient (None)."""
    size, maps = student.element_size(), 4 * len(student) * pixels
    if phase is None:  # the features and a coefficient per pixel in, the gradient out
        return 2 * size * student.numel() + maps, 2 * student.numel()
    elements = student.numel() + teacher.numel()
    energies = (size * elements + 2 * maps, 2 * elements)
    # Two norms and the difference of two maps; derivative and losses out.
    compared = (3 * maps, 12 * maps // 4)
    if phase == 0:
        return energies[0] + maps, energies[1] + compared[1]
    return energies if phase == 1 else compared
