"""CIFAR residual networks: resnet8/14/20/32/44/56/110 and the four times wider resnet8x4/32x4.

stem 3x3 conv, BN, ReLU -> three stages of n = (depth - 2) / 6 post-activation basic blocks, strides
1, 2, 2 -> global average pool -> linear. Where stride or width changes, the shortcut is a 1x1
convolution with BN. He et al. 2015 (arXiv 1512.03385) section 4.2, with the projection shortcuts
and the widths (x4: 32; 64, 128, 256) of RepDistiller's zoo; parameter names are RepDistiller's too.
`shortcuts="pad"` is the paper's own kind; cheap blocks as in Moonshine (arXiv 1711.02613).
"""

import re
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.models.blocks.layers import (
    ResidualBlock,
    Shortcuts,
    init_convs,
    make_shortcut,
    norm_projection,
    substitute,
)
from fastkd.models.zoo.staged import StagedNetwork, make_stage

__all__ = ["NAMES", "PATTERN", "BasicBlock", "CifarResNet", "build"]

NAMES = (
    "resnet8",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "resnet8x4",
    "resnet32x4",
)
PATTERN = re.compile("|".join(NAMES))
KEY_MAPS = {"akamaster": {"linear": "fc"}}


def build(
    name: str,
    num_classes: int,
    *,
    width: float = 1.0,
    block: str = "S",
    shortcuts: Shortcuts = True,
) -> "CifarResNet":
    """Network by zoo name.

    width: factor on every channel count (resnet8, 0.25: 4, 4, 8, 16).
    block: substitute for the 3x3 convolutions of the residual blocks (`blocks.grammar`).
    shortcuts: see `blocks.layers.Shortcuts`.
    """
    depth, _, factor = name.removeprefix("resnet").partition("x")
    base = (32, 64, 128, 256) if factor else (16, 16, 32, 64)
    widths = tuple(round(channels * width) for channels in base)
    if min(widths) < 1:
        raise UserError(
            f"{name}: width={width} leaves no channels, it scales {base}; use a larger width"
        )
    return CifarResNet(int(depth), widths, num_classes, block=block, shortcuts=shortcuts)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions, added to the shortcut, then ReLU.

    A bottleneck (B, BG) replaces both: bottleneck - BN, added, then ReLU.
    """

    shortcut_name: ClassVar[str] = "downsample"
    ways_to_run: ClassVar[tuple[str, ...]] = ("preact",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        block: str = "S",
        shortcuts: Shortcuts = True,
    ) -> None:
        super().__init__()
        self.conv1 = substitute(self.block, in_channels, out_channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2: nn.Module | None = None
        self.bn2: nn.Module | None = None
        if not self.block.is_bottleneck:
            self.conv2 = substitute(self.block, out_channels, out_channels)
            self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = make_shortcut(
            shortcuts, in_channels, out_channels, stride, norm_projection
        )

    def preact(self, x_NCHW: Tensor) -> Tensor:
        """The residual sum before the last ReLU."""
        out = self.bn1(self.conv1(x_NCHW))
        if self.conv2 is not None and self.bn2 is not None:
            out = self.bn2(self.conv2(F.relu(out)))
        return out if self.downsample is None else out + self.downsample(x_NCHW)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H / stride, W / stride]."""
        return F.relu(self.preact(x_NCHW))


class CifarResNet(StagedNetwork):
    """images [N, 3, H, W], H and W at least 4 -> logits [N, num_classes]."""

    num_stages = 3
    key_maps = KEY_MAPS

    def __init__(
        self, depth: int, widths: tuple[int, ...], num_classes: int, **block_options: Any
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        stem, stage1, stage2, stage3 = widths
        block = partial(BasicBlock, **block_options)
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = make_stage(block, stem, stage1, 1, blocks)
        self.layer2 = make_stage(block, stage1, stage2, 2, blocks)
        self.layer3 = make_stage(block, stage2, stage3, 2, blocks)
        self.fc = nn.Linear(stage3, num_classes)
        init_convs(self)
