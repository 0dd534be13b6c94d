"""Wide residual networks wrn_D_W: depth D = 6n + 4, width factor W.

stem 3x3 conv (no BN) -> three stages of n pre-activation blocks BN-ReLU-conv-BN-ReLU-conv of widths
16W, 32W, 64W, strides 1, 2, 2 -> BN, ReLU -> global average pool -> linear. Where the width
changes, the shortcut is a 1x1 convolution without BN on the block's already normalised and
rectified input; elsewhere it is the raw input. Zagoruyko and Komodakis 2016 (arXiv 1605.07146), as
defined in RepDistiller's zoo; cheap blocks as in Moonshine (arXiv 1711.02613) and without shortcuts
as in Demystification (arXiv 2006.16589).
"""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fastkd.errors import UserError
from fastkd.models.blocks.layers import (
    ResidualBlock,
    Shortcuts,
    init_convs,
    make_shortcut,
    substitute,
)
from fastkd.models.blocks.moonshine_names import moonshine_names
from fastkd.models.taps import ZooNetwork
from fastkd.models.zoo.staged import make_stage

__all__ = ["NAMES", "PATTERN", "PreactBlock", "WideResNet", "build"]

NAMES = (
    "wrn_10_1",
    "wrn_10_2",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_16_4",
    "wrn_22_2",
    "wrn_28_2",
    "wrn_28_10",
    "wrn_40_1",
    "wrn_40_2",
    "wrn_40_4",
)
PATTERN = re.compile(r"wrn_(\d{1,4})_(\d{1,3})")
KEY_MAPS = {
    "RepDistiller": {
        r"block(\d)\.layer\.(\d+)\.convShortcut": r"layer\1.\2.shortcut",
        r"block(\d)\.layer": r"layer\1",
    },
    "pytorch-moonshine": moonshine_names,
}


def build(
    name: str,
    num_classes: int,
    *,
    block: str = "S",
    shortcuts: Shortcuts = True,
    dropout: float = 0.0,
) -> "WideResNet":
    """Network by zoo name, any `wrn_D_W` with D = 6n + 4 and W >= 1.

    block: substitute for the 3x3 convolutions of the residual blocks (`blocks.grammar`).
    shortcuts: see `blocks.layers.Shortcuts`. dropout: probability inside the residual blocks.
    """
    match = PATTERN.fullmatch(name)
    assert match is not None
    depth, width = int(match[1]), int(match[2])
    if depth < 10 or (depth - 4) % 6:
        below = max(10, depth - (depth - 4) % 6)
        raise UserError(
            f"{name}: the depth of a wide residual network is 6n + 4, got {depth}; "
            f"use wrn_{below}_{width} or wrn_{below + 6}_{width}"
        )
    if width < 1:
        raise UserError(f"{name}: the width factor must be at least 1; use wrn_{depth}_1 or wider")
    if not 0 <= dropout < 1:
        raise UserError(f"{name}: dropout={dropout}: expected a probability below 1")
    return WideResNet(depth, width, num_classes, block=block, shortcuts=shortcuts, dropout=dropout)


class PreactBlock(ResidualBlock):
    """Residual block that normalises and rectifies before each of its two 3x3 convolutions.

    A bottleneck (B, BG) replaces both: BN - ReLU - bottleneck, added. Dropout is in front of
    `conv2`, or of the bottleneck.
    """

    ways_to_run: ClassVar[tuple[str, ...]] = ("after_bn1",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        block: str = "S",
        shortcuts: Shortcuts = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = substitute(self.block, in_channels, out_channels, stride=stride)
        self.bn2: nn.Module | None = None
        self.conv2: nn.Module | None = None
        if not self.block.is_bottleneck:
            self.bn2 = nn.BatchNorm2d(out_channels)
            self.conv2 = substitute(self.block, out_channels, out_channels)
        self.dropout = dropout
        self.shortcut = make_shortcut(shortcuts, in_channels, out_channels, stride, _projection)

    def after_bn1(self, x_NCHW: Tensor, normed_NCHW: Tensor) -> Tensor:
        """The block from its input and `bn1` of that input, which may also serve as a tap."""
        active = F.relu(normed_NCHW)
        hidden = active if self.bn2 is None else F.relu(self.bn2(self.conv1(active)))
        last = self.conv1 if self.conv2 is None else self.conv2
        out = last(F.dropout(hidden, self.dropout, self.training))
        if self.shortcut is None:
            return out
        return out + self.shortcut(x_NCHW if isinstance(self.shortcut, nn.Identity) else active)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H / stride, W / stride], a raw residual sum."""
        return self.after_bn1(x_NCHW, self.bn1(x_NCHW))


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Without batch norm: its input is normalised and rectified already."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


class WideResNet(ZooNetwork):
    """images [N, 3, H, W], H and W at least 4 -> logits [N, num_classes]."""

    tap_names = (
        "stem",
        "stage1",
        "stage1:preact",
        "stage2",
        "stage2:preact",
        "stage3",
        "stage3:preact",
        "pooled",
        "logits",
    )
    key_maps = KEY_MAPS

    def __init__(self, depth: int, width: int, num_classes: int, **block_options: Any) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        block = partial(PreactBlock, **block_options)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = make_stage(block, 16, 16 * width, 1, blocks)
        self.layer2 = make_stage(block, 16 * width, 32 * width, 2, blocks)
        self.layer3 = make_stage(block, 32 * width, 64 * width, 2, blocks)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        init_convs(self)
        nn.init.zeros_(self.fc.bias)

    @override
    def stage_paths(self) -> dict[str, tuple[str, ...]]:
        return {f"stage{n}": (f"layer{n}",) for n in (1, 2, 3)}

    def walk(self, x: Tensor, after: str = "images") -> Iterator[tuple[str, Tensor]]:
        """Taps in order: `stageN` is the raw residual sum, `stageN:preact` its batch norm.

        RepDistiller runs that batch norm, which belongs to the next block, a second time for the
        tap; here its one output serves both, so the running statistics move once a pass.
        """
        done = ("images", "stem", "stage1", "stage2", "stage3", "pooled").index(after)
        if done < 1:
            x = self.conv1(x)
            yield "stem", x
        for number, stage in enumerate((self.layer1, self.layer2, self.layer3), start=1):
            if done > number:
                continue
            first, *blocks = cast(Iterable[PreactBlock], stage)
            normed = first.bn1(x)
            if number > 1:
                yield f"stage{number - 1}:preact", normed
            x = first.after_bn1(x, normed)
            for block in blocks:
                x = block(x)
            yield f"stage{number}", x
        if done < 5:
            x = self.bn1(x)
            yield "stage3:preact", x
            x = F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1)
            yield "pooled", x
        yield "logits", self.fc(x)
