"""The Triton stages of `grouped_pointwise` against float64, interpreted or on a GPU.

test_triton.py starts the interpreter, benchmarks/gpu.py the GPU. A case is one that no other
covers: see grouped_pointwise_cases.py for all, a share of which is the matrix here.
"""

from dataclasses import replace

import pytest
import torch
from grouped_pointwise_cases import CASES, Case, check_stage

from fastkd.kernels.grouped_pointwise.inputs import Geometry
from fastkd.kernels.grouped_pointwise.op import STAGES

gpu = pytest.importorskip("fastkd.kernels.grouped_pointwise.gpu", reason="needs Triton")
table = pytest.importorskip("fastkd.kernels.grouped_pointwise.gpu_table", reason="needs Triton")

ALL = tuple(STAGES)
CONVOLUTIONS = ("grouped", "grouped_backward")
BF16 = torch.bfloat16
# Channels that no tile is full of; a batch of two images per tile.
SMALL = Case(channels=18, groups=6, height=5, width=3, out=17, bias=True, dtype=BF16)
FEW = [
    *((name, SMALL) for name in ALL),
    # Groups of several tiles; pixels by their remainders.
    *((name, Case(num=1, channels=34, groups=1, height=3, width=3)) for name in CONVOLUTIONS),
    ("grouped", Case(num=1, channels=20, groups=1, height=3, width=4, stride=2, dtype=BF16)),
    ("grouped_backward", Case(num=1, groups=16, height=5, width=4, stride=2, act=2)),
    ("pair", Case(groups=16, height=3, width=4, stride=2, residual=True, after=False)),
    ("statistics", Case(num=3, height=11, shift=300.0)),
    ("normalise", Case(height=3, width=3, residual=True, activate_sum=True, act=2)),
    ("normalise_backward", Case(height=3, width=3, residual=True, activate_sum=True, act=2)),
]
REST = [(name, case) for case in CASES for name in ALL]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on large images: programs walk over several blocks, and down several rows."""
    few = {
        chip: {size: replace(shapes, programs=1) for size, shapes in by_size.items()}
        for chip, by_size in table.TABLES.items()
    }
    monkeypatch.setattr(table, "TABLES", few)


# The interpreter takes seconds for each; `pytest -m slow` has the others.
IN_MATRIX = [pytest.param(*words, marks=pytest.mark.matrix) for words in REST[:90:6]]
BY_HAND = [
    pytest.param(*words, marks=pytest.mark.slow)
    for index, words in enumerate(REST)
    if index >= 90 or index % 6
]


@pytest.mark.parametrize(("name", "case"), [*FEW, *IN_MATRIX, *BY_HAND])
def test_stage_is_as_accurate_as_the_reference(name: str, case: Case, fast: str) -> None:
    if fast != "triton":
        pytest.skip("the C++ stages are tested in test_grouped_pointwise.py")
    check_stage(gpu, name, case)


@pytest.mark.parametrize("channels", [1, 3, 16, 24, 33, 40, 96, 100, 512, 576])
def test_tiles_cover_all_channels_with_whole_groups(channels: int) -> None:
    """Every output channel belongs to one tile, and a set's inputs are all read."""
    blocks = table.TABLES[90][2].gather
    for groups in (size for size in range(1, channels + 1) if channels % size == 0):
        of_group = channels // groups
        tile = table.conv_tile(channels, groups, blocks)
        assert tile.used % of_group == 0
        assert tile.block * tile.inputs >= tile.used
        assert tile.inputs == 1 or tile.used == of_group
        sets = -(-channels // tile.used)
        assert tile.tiles == sets * tile.inputs


@pytest.mark.parametrize("pixels", [1, 63, 64, 65, 5000, 10**6])
@pytest.mark.parametrize("tiles", [1, 3, 500])
def test_shares_cover_all_pixels_and_none_is_empty(pixels: int, tiles: int) -> None:
    share, programs = table.shares(pixels, 64, tiles, table.TABLES[90][2])
    assert share % 64 == 0
    assert share * programs >= pixels > share * (programs - 1)


def test_more_pixels_than_the_kernels_count_are_refused() -> None:
    x = torch.empty(2, 1, 32768, 32768, device="meta")
    with pytest.raises(ValueError, match=r"2147483648 pixels .* use a smaller batch"):
        gpu.normalise(x, [], 1e-5, 1, None, False)
    weight = torch.empty(1, 1, 3, 3, device="meta")
    with pytest.raises(ValueError, match="use a smaller batch"):
        gpu.grouped(x, [], 1e-5, 0, weight, None, *Geometry(1, 1, 1, 1), False)
