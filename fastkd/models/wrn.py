"""Wide residual networks wrn_D_W: depth D = 6n + 4, width factor W.

stem 3x3 conv (no BN) -> three stages of n pre-activation blocks BN-ReLU-conv-BN-ReLU-conv of widths
16W, 32W, 64W, strides 1, 2, 2 -> BN, ReLU -> global average pool -> linear. Where the width
changes, the shortcut is a 1x1 convolution without BN on the block's already normalised and
rectified input; elsewhere it is the raw input. Zagoruyko and Komodakis 2016 (arXiv 1605.07146),
without dropout, as defined in RepDistiller's zoo.
"""

import re
from collections.abc import Iterable, Iterator
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.models.taps import ZooNetwork

__all__ = ["NAMES", "PATTERN", "PreactBlock", "WideResNet", "build"]

NAMES = (
    *(
        "wrn_10_1",
        "wrn_10_2",
        "wrn_16_1",
        "wrn_16_2",
        "wrn_16_4",
        "wrn_22_2",
        "wrn_28_2",
        "wrn_28_10",
    ),
    *("wrn_40_1", "wrn_40_2", "wrn_40_4"),
)
PATTERN = re.compile(r"wrn_(\d{1,4})_(\d{1,3})")


def build(name: str, num_classes: int) -> "WideResNet":
    """Network by zoo name, any `wrn_D_W` with D = 6n + 4 and W >= 1."""
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
    return WideResNet(depth, width, num_classes)


class PreactBlock(nn.Module):
    """Residual block that normalises and rectifies before each of its two 3x3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def after_bn1(self, x_NCHW: Tensor, normed_NCHW: Tensor) -> Tensor:
        """The block from its input and `bn1` of that input, which may also serve as a tap."""
        active = F.relu(normed_NCHW)
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x_NCHW if self.shortcut is None else self.shortcut(active))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H / stride, W / stride], a raw residual sum."""
        return self.after_bn1(x_NCHW, self.bn1(x_NCHW))


class WideResNet(ZooNetwork):
    """images [N, 3, H, W], H and W at least 4 -> logits [N, num_classes]."""

    tap_names = (
        *("stem", "stage1", "stage1:preact", "stage2", "stage2:preact", "stage3", "stage3:preact"),
        *("pooled", "logits"),
    )

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(16, 16 * width, 1, blocks)
        self.layer2 = _stage(16 * width, 32 * width, 2, blocks)
        self.layer3 = _stage(32 * width, 64 * width, 2, blocks)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

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


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int) -> nn.Sequential:
    rest = (PreactBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(PreactBlock(in_channels, out_channels, stride), *rest)
