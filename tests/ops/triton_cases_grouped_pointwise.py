"""The launches of `grouped_pointwise` that triton_offline.py compiles, as gpu.py makes them."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton_offline import Launch, recorded

from fastkd.kernels.grouped_pointwise import gpu
from fastkd.kernels.grouped_pointwise.inputs import After, Geometry

FP32, BF16 = torch.float32, torch.bfloat16
# (case, batch, channels, channels out, side, groups, stride, dtype)
CASES = [
    ("WRN 128 x 32 x 32x32, 2 a group", 128, 32, 32, 32, 16, 1, BF16),
    ("the same in fp32", 128, 32, 32, 32, 16, 1, FP32),
    ("ResNet-34 128 x 128 x 28x28, 32 a group", 128, 128, 128, 28, 4, 1, BF16),
    ("ResNet-34 128 x 256 x 14x14, 64 a group", 128, 256, 256, 14, 4, 1, BF16),
    ("MobileNetV2 128 x 96 -> 24 x 112x112, depthwise, stride 2", 128, 96, 24, 112, 96, 2, BF16),
]
MERGING = ("moments_kernel", "reduce_kernel")
# By default every kernel is compiled once.
REPRESENTATIVE = {CASES[0][0]: None, CASES[4][0]: ("gather_kernel",)}
REPRESENTATIVE[CASES[2][0]] = ("pointwise_weight_kernel",)


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def norm(channels: int) -> list[Tensor]:
    return [empty(channels) for _ in range(4)]


def after(out: Tensor) -> list[Tensor]:
    return [*After(out, *(empty(out.shape[1]) for _ in range(3)), empty(2, out.shape[1]))]


def calls(
    num: int, channels: int, out: int, side: int, groups: int, stride: int, dtype: torch.dtype
) -> Iterator[Any]:
    """The stages of 3x3 -> norm -> ReLU -> 1x1 -> norm -> ReLU; of wide groups the 3x3 alone."""
    geometry = Geometry(stride, 1, 1, groups)
    x = empty(num, channels, side, side, dtype=dtype)
    y = empty(num, channels, *map(geometry.out_size, (side, side)), dtype=dtype)
    z = empty(num, out, *y.shape[2:], dtype=dtype)
    grouped, pointwise = empty(channels, channels // groups, 3, 3), empty(out, channels, 1, 1)
    plain, normed = ([], 1e-5, 0), (norm(channels), 1e-5, 1)
    last = (norm(out), 1e-5, 1)
    yield partial(gpu.grouped, x, *plain, grouped, None, *geometry, True)
    backward = (grouped, False, *geometry, (True, True))
    yield partial(gpu.grouped_backward, y, after(y), 1e-5, x, *plain, *backward)
    if channels // groups > 32:
        return
    yield partial(gpu.pointwise, y, *normed, pointwise, None, True)
    yield partial(gpu.normalise, z, *last, None, False)
    behind = (pointwise, None, *last, None, False)
    yield partial(gpu.pair, x, *plain, grouped, None, *geometry, *normed, *behind)
    yield partial(gpu.normalise_backward, z, z, *last, None, False)
    rest = (pointwise, False, (True, True))
    yield partial(gpu.pointwise_backward, z, after(z), 1e-5, y, *normed, *rest)
    yield partial(gpu.denormalise, y, after(y), 1e-5)
    yield partial(gpu.statistics, x)


def launches() -> Iterator[Launch]:
    """Every launch of every stage; one that several stages make alike is listed once."""
    for case, *words in CASES:
        seen: list[Any] = []
        for call in calls(*words):
            for kernel, arguments, options in recorded(gpu, call):
                constants = {
                    k: v for k, v in arguments.items() if not isinstance(v, Tensor | tuple)
                }
                name = kernel.fn.__name__
                # Merging the programs' parts is alike everywhere: one of each will do.
                key = name if name in MERGING else (name, constants, least(arguments))
                if key in seen:
                    continue
                seen.append(key)
                kernels = REPRESENTATIVE.get(case, ())
                operations, products = work(name, arguments)
                yield Launch(
                    kernel,
                    case,
                    arguments,
                    options,
                    moved_bytes=least(arguments),
                    operations=operations,
                    products=products,
                    wide_loads=reads_wide(name, arguments, options["num_warps"]),
                    representative=kernels is None or name in kernels,
                )


def reads_wide(name: str, arguments: Mapping[str, Any], warps: int) -> bool:
    """Whether a lane has 128 bits of its own in the tile of a convolution, as of all others.

    Sums of programs are read in rows as long as they happen to be.
    """
    if name in MERGING or not {"BLOCK_P", "BLOCK_C", "x_ptr"} <= arguments.keys():
        return name not in MERGING
    tile = arguments["BLOCK_P"] * arguments["BLOCK_C"] * arguments["x_ptr"].element_size()
    return 8 * tile >= 128 * 32 * warps


def tensors(arguments: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in arguments.values():
        parts = value if isinstance(value, tuple) else (value,)
        yield from (x for x in parts if isinstance(x, Tensor))


def least(arguments: Mapping[str, Any]) -> int:
    """Bytes of all tensors, each read or written once."""
    return sum(x.numel() * x.element_size() for x in tensors(arguments))


def work(name: str, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Operations on the vector units and in products of 16-bit matrices, of the formula."""
    read = next(x for key, x in arguments.items() if key in SOURCES and x is not None)
    macs = 0
    if name in ("slide_kernel", "gather_kernel", "pair_kernel"):
        # Both directions make one product per element of the smaller side, tap and channel.
        sides = (arguments["x_ptr"], arguments["y_ptr"])
        pixels = min(x.numel() // x.shape[1] for x in sides)
        macs = pixels * arguments["C"] * (9 * arguments["CPG"] + arguments.get("CO", 0))
    elif name == "grouped_weight_kernel":
        macs = 9 * read.numel() * arguments["CPG"]
    elif name.startswith("pointwise"):
        both = 2 if arguments.get("dw_ptr") is not None else 1
        macs = both * arguments["pixels"] * arguments["C"] * arguments["CO"]
    # Per element a subtraction, a product, a sum, and as many again for the sums of pixels.
    operations = 6 * read.numel()
    return (operations + 2 * macs, 0) if read.dtype == FP32 else (operations, 2 * macs)


SOURCES = ("g_ptr", "x_ptr", "partial_ptr", "parts_ptr")
