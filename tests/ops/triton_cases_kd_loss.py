"""The launches of `kd_loss` that triton_offline.py compiles, as gpu.py makes them."""

from collections.abc import Iterator

import torch
from torch import Tensor
from triton_offline import Launch, recorded

from fastkd.kernels.kd_loss import gpu
from fastkd.kernels.kd_loss.inputs import Inputs

# name: (shape, dtype, whether 128-bit loads are expected: an odd number of classes leaves rows at
# odd addresses)
CASES = {
    "1x1000 fp32": ((1, 1000), torch.float32, True),
    "64x100 fp32": ((64, 100), torch.float32, True),
    "1024x1000 fp32": ((1024, 1000), torch.float32, True),
    "1024x1000 bf16": ((1024, 1000), torch.bfloat16, True),
    "1024x21841 bf16": ((1024, 21841), torch.bfloat16, False),
    "16x1000000 bf16, split": ((16, 1_000_000), torch.bfloat16, True),
    "dense 19 classes bf16": ((4, 19, 131072), torch.bfloat16, True),
    "dense 150 classes bf16": ((4, 150, 131072), torch.bfloat16, True),
}
REPRESENTATIVE = ("1x1000 fp32", "16x1000000 bf16, split", "dense 19 classes bf16")
# One program over a few numbers.
UNLISTED = ("reduce_kernel",)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches() -> Iterator[Launch]:
    """Forward pass of the mean (in two launches where rows are split) and gradient of each case."""
    for case, (shape, dtype, wide_loads) in CASES.items():
        student, teacher = (empty(*shape, dtype=dtype) for _ in range(2))
        labels = empty(shape[0], *shape[2:], dtype=torch.int64)
        inputs = Inputs(student, [teacher], labels, 4.0, 0.0, -100, 1, None, None)

        def both(inputs: Inputs = inputs) -> None:
            _, divisor, _, stats = gpu.mean(inputs, 0.9, 0.1, False)
            gpu.grad(inputs, empty(), empty(), divisor, stats, 0.9, 0.1)

        for kernel, arguments, options in recorded(gpu, both):
            name = kernel.fn.__name__
            if name in UNLISTED:
                continue
            moved, operations = least(name, student, arguments)
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


def least(kernel: str, student: Tensor, arguments: dict) -> tuple[int, int]:
    """Bytes to move and operations of a launch."""
    elements, size, rows = student.numel(), student.element_size(), arguments["num_rows"]
    # Labels, six statistics of a row; of a split row 11 numbers from each program.
    row_bytes = rows * (8 + 6 * 4)
    parts = 11 * rows * arguments.get("splits", 1)
    # Per class: 2 scalings, 3 maxima, 3 exponentials, 5 sums, 4 for the logarithm, argmax.
    if kernel == "part_kernel":
        return 4 * parts + row_bytes + 2 * size * elements, 19 * elements
    if kernel == "forward_kernel" and arguments["work_ptr"] is not None:
        return 4 * parts + row_bytes, parts
    if kernel == "forward_kernel":
        return row_bytes + 2 * size * elements, 19 * elements
    # Per class: 3 exponentials with their scaling, the differences and the upstream.
    return row_bytes + 3 * size * elements, 11 * elements
