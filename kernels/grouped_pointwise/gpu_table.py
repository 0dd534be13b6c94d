"""Launch shapes of the Triton kernels of `grouped_pointwise`, one table per class of chips.

A launch is a pure function of shapes, dtype and chip, so results repeat bit for bit. Tuning on a
GPU rewrites the numbers below and nothing else. They have not been timed yet: they are those that
compile without spills and with the fewest instructions per element.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

__all__ = [
    "ConvTile",
    "Rows",
    "Table",
    "by_width",
    "conv_tile",
    "matrix_tile",
    "pair_fits",
    "shares",
    "strip_rows",
    "strips",
    "table_for",
    "walk_tile",
]

Shape = TypeVar("Shape")


class Rows(NamedTuple):
    """A walk down the rows: columns and most rows of a program, warps."""

    columns: int
    rows: int
    warps: int


class Matrix(NamedTuple):
    """A product of matrices: pixels of a block, most channels read and written at a time, warps."""

    pixels: int
    read: int
    write: int
    warps: int
    stages: int = 1

    @property
    def warps_along(self) -> int:
        """Warps that a product lays along the pixels: they hold rows of their own."""
        return min(self.warps, self.pixels // 16)


@dataclass(frozen=True)
class Table:
    """What a class of chips takes for one width of dtype."""

    slide: dict[int, Rows]
    """By channels of a tile. Two warps: four would choose wgmma, which reads its inputs again for
    each tap."""
    gather: dict[int, tuple[int, int]]
    """By channels of a tile: positions, warps. The widest tile takes all wider groups."""
    grouped_weight: dict[int, tuple[int, int]]
    """The same, of the weight gradient."""
    pair: dict[int, Rows]
    """By channels on the wider side of the pointwise convolution, of which there are no more."""
    pair_tile: int
    """Widest tile of the grouped convolution beside which they are summed."""
    pointwise: dict[int, Matrix]
    """By channels read; the widest takes more in a loop."""
    pointwise_backward: Matrix
    fused_weights: int
    """Most elements of a weight gradient that is summed beside the data gradient."""
    pointwise_weight: Matrix
    walk: tuple[int, int]
    """Elements of a block and warps, where values are only normalised."""
    programs: int
    """Most programs of a kernel that walks over blocks: two per multiprocessor."""


_HALF = Table(
    slide={16: Rows(64, 8, 2), 32: Rows(64, 4, 4)},
    gather={16: (64, 2), 32: (64, 4), 64: (64, 4)},
    grouped_weight={16: (64, 2), 32: (16, 2)},
    pair={64: Rows(64, 2, 4), 128: Rows(64, 2, 8)},
    pair_tile=16,
    pointwise={64: Matrix(128, 64, 64, 4), 128: Matrix(64, 128, 64, 8)},
    pointwise_backward=Matrix(64, 64, 64, 8),
    fused_weights=4096,
    pointwise_weight=Matrix(64, 64, 64, 4, stages=2),
    walk=(4096, 4),
    programs=264,
)
# Products in fp32 run on the vector units: smaller tiles.
_SINGLE = replace(
    _HALF,
    slide={16: Rows(64, 2, 4), 32: Rows(32, 2, 4)},
    gather={16: (64, 4), 32: (64, 4), 64: (32, 4)},
    grouped_weight={16: (32, 4), 32: (32, 8)},
    pair={64: Rows(32, 1, 4)},
    pointwise={64: Matrix(64, 64, 64, 4)},
    pointwise_weight=Matrix(32, 64, 64, 4),
    walk=(2048, 4),
)

TABLES: dict[int, dict[int, Table]] = {
    80: {2: _HALF, 4: _SINGLE},
    90: {2: _HALF, 4: _SINGLE},
    100: {2: _HALF, 4: _SINGLE},
}
"""By compute capability (the largest that the chip reaches) and bytes of an activation."""


def table_for(x: Tensor) -> Table:
    """The table of the device of `x`; that of an H100 where it is on no GPU."""
    reached = 90
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        reached = max((chip for chip in TABLES if chip <= 10 * major + minor), default=min(TABLES))
    return TABLES[reached][x.element_size()]


class ConvTile(NamedTuple):
    """A tile of a grouped convolution."""

    block: int
    """Channels that a tile has room for."""
    used: int
    """Channels of a set: whole groups that share a tile, or one group of several tiles."""
    tiles: int
    """Of outputs, of all sets."""
    inputs: int
    """Tiles of inputs that each of them reads."""


def conv_tile(channels: int, groups: int, blocks: dict[int, tuple[int, int]]) -> ConvTile:
    """The narrowest tile that holds a group, or several of the widest."""
    of_group = channels // groups
    block = min((size for size in blocks if size >= of_group), default=max(blocks))
    used = max(block // of_group, 1) * of_group
    inputs = triton.cdiv(used, block)
    return ConvTile(block, used, triton.cdiv(channels, used) * inputs, inputs)


def strip_rows(most: Rows, table: Table, tiles: int, y: Tensor, stride: int, dilation: int) -> Rows:
    """A walk that is as long as leaves enough programs; with a stride nothing is shared."""
    walk = most._replace(rows=1) if stride > 1 else most
    height = triton.cdiv(y.shape[2], dilation)
    while walk.rows > 1 and (
        walk.rows >= 2 * height or tiles * strips(y, dilation, walk) < 2 * table.programs
    ):
        walk = walk._replace(rows=walk.rows // 2)
    return walk


def strips(y: Tensor, dilation: int, shape: Rows) -> int:
    """Programs for all of `y`: pieces of rows that are `dilation` apart, times columns."""
    pieces = dilation * triton.cdiv(triton.cdiv(y.shape[2], dilation), shape.rows)
    return pieces * triton.cdiv(len(y) * y.shape[3], shape.columns)


def matrix_tile(shape: Matrix, read: int, write: int) -> tuple[int, int]:
    """Channels read and written at a time; products need 16 of them."""
    return tuple(
        min(most, max(16, triton.next_power_of_2(size)))
        for most, size in ((shape.read, read), (shape.write, write))
    )


def walk_tile(table: Table, channels: int) -> tuple[int, int, int]:
    """(pixels, channels, warps) of a block: channels that divide all of them, where they do."""
    elements, warps = table.walk
    block = channels & -channels
    if block < 8:
        block = triton.next_power_of_2(channels)
    block = min(block, 128)
    return elements // block, block, warps


def by_width(shapes: dict[int, Shape], channels: int) -> Shape:
    """The shape for the narrowest width that takes so many channels, or for the widest."""
    return shapes[min((size for size in shapes if size >= channels), default=max(shapes))]


def pair_fits(table: Table, channels: int, out_channels: int, groups: int) -> bool:
    """Whether a program holds all channels of the result, and a tile whole groups."""
    tile = conv_tile(channels, groups, table.gather)
    fits = max(channels, out_channels) <= max(table.pair)
    return fits and tile.inputs == 1 and tile.block <= table.pair_tile


def shares(pixels: int, block: int, tiles: int, table: Table) -> tuple[int, int]:
    """(pixels of a program, programs per tile), for kernels that walk over blocks of pixels."""
    blocks = triton.cdiv(pixels, block)
    programs = min(blocks, max(1, table.programs // tiles))
    share = triton.cdiv(blocks, programs) * block
    return share, triton.cdiv(pixels, share)
