"""ResNet-50 for small images (CIFAR).

stem 3x3 conv, BN, ReLU, no pooling -> four stages of 3, 4, 6, 3 bottleneck blocks, 256, 512, 1024,
2048 channels, strides 1, 2, 2, 2 (on the 3x3 convolution) -> global average pool -> linear. Where
stride or width changes, the shortcut is a 1x1 convolution with BN. He et al. 2015 (arXiv
1512.03385) table 1, with the stem of RepDistiller's `ResNet50`; parameter names are torchvision's.
The network for 224 pixels is `timm:resnet50` or `torchvision:resnet50`.
"""

import re
from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models.blocks.layers import (
    ResidualBlock,
    Shortcuts,
    init_convs,
    make_shortcut,
    norm_projection,
    substitute,
)
from fastkd.models.zoo.resnet18 import KEY_MAPS
from fastkd.models.zoo.staged import StagedNetwork, make_stage

__all__ = ["NAMES", "PATTERN", "Bottleneck", "CifarResNet50", "build"]

NAMES = ("resnet50",)
PATTERN = re.compile(NAMES[0])
WIDTHS, STRIDES, BLOCKS = (256, 512, 1024, 2048), (1, 2, 2, 2), (3, 4, 6, 3)


def build(name: str, num_classes: int) -> "CifarResNet50":
    """Network by zoo name."""
    return CifarResNet50(num_classes)


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolution, added to the shortcut, then ReLU.

    block, shortcuts: as `cheapen` changes the 3x3, and `remove_shortcuts` the shortcut.
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
        inside = out_channels // 4
        self.conv1 = nn.Conv2d(in_channels, inside, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv2 = substitute(self.block, inside, inside, stride=stride)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv3 = nn.Conv2d(inside, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = make_shortcut(
            shortcuts, in_channels, out_channels, stride, norm_projection
        )

    def preact(self, x_NCHW: Tensor) -> Tensor:
        """The residual sum before the last ReLU."""
        out = F.relu(self.bn1(self.conv1(x_NCHW)))
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return out if self.downsample is None else out + self.downsample(x_NCHW)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H / stride, W / stride]."""
        return F.relu(self.preact(x_NCHW))


class CifarResNet50(StagedNetwork):
    """images [N, 3, H, W] -> logits [N, num_classes]."""

    num_stages = 4
    key_maps = KEY_MAPS

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        stages = map(partial(make_stage, Bottleneck), (64, *WIDTHS), WIDTHS, STRIDES, BLOCKS)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(WIDTHS[-1], num_classes)
        init_convs(self)
