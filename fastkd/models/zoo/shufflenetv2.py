"""ShuffleNet version 2 (width 1x) for small images.

1x1 conv to 24 channels, BN, ReLU -> three stages of 116, 232, 464 channels, each a unit of stride 2
and 3, 7, 3 more -> 1x1 conv to 1024, BN, ReLU -> global average pool -> linear. A unit of stride 1
keeps half of its channels and sends the other half through 1x1, depthwise 3x3, 1x1; one of stride
2 sends all through two branches. The halves are concatenated and their channels interleaved. Ma et
al. 2018 (arXiv 1807.11164) figure 3 (c, d) and table 5; the stem without stride or pooling is
RepDistiller's. At 32, 64 and 224 pixels the last map has 4, 8 and 28 pixels a side.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fastkd.models.zoo.staged import StagedNetwork

__all__ = ["NAMES", "PATTERN", "DownUnit", "ShuffleNetV2", "SplitUnit", "build"]

NAMES = ("shufflenetv2",)
PATTERN = re.compile(NAMES[0])
KEY_MAPS = {"RepDistiller": {"linear": "fc"}}
STEM, WIDTHS, UNITS, LAST = 24, (116, 232, 464), (3, 7, 3), 1024


def build(name: str, num_classes: int) -> "ShuffleNetV2":
    """Network by zoo name."""
    return ShuffleNetV2(num_classes)


class SplitUnit(nn.Module):
    """[N, C, H, W] -> the same shape."""

    keeps_shape = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def preact(self, x_NCHW: Tensor) -> Tensor:
        """The kept half, then the worked half before its last ReLU; not yet interleaved."""
        kept, out = x_NCHW.chunk(2, dim=1)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(out)))))
        return torch.cat((kept, self.bn3(self.conv3(out))), dim=1)

    @override
    def forward(self, x_NCHW: Tensor) -> Tensor:
        return _rectify_and_interleave(self.preact(x_NCHW))


class DownUnit(nn.Module):
    """[N, in, H, W] -> [N, out, H / 2, W / 2]."""

    keeps_shape = False

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, 2, 1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def preact(self, x_NCHW: Tensor) -> Tensor:
        """Both branches before their last ReLU; not yet interleaved."""
        left = self.bn2(self.conv2(self.bn1(self.conv1(x_NCHW))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x_NCHW)))))
        return torch.cat((left, self.bn5(self.conv5(right))), dim=1)

    @override
    def forward(self, x_NCHW: Tensor) -> Tensor:
        return _rectify_and_interleave(self.preact(x_NCHW))


class ShuffleNetV2(StagedNetwork):
    """images [N, 3, H, W] -> logits [N, num_classes]."""

    num_stages = 3
    key_maps = KEY_MAPS

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1, self.layer2, self.layer3 = map(_stage, (STEM, *WIDTHS), WIDTHS, UNITS)
        self.conv2 = nn.Conv2d(WIDTHS[-1], LAST, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(LAST)
        self.fc = nn.Linear(LAST, num_classes)

    def activate(self, preact: Tensor) -> Tensor:
        """ReLU and the interleaving of the halves."""
        return _rectify_and_interleave(preact)

    def neck(self, x: Tensor) -> Tensor:
        """1x1 convolution to 1024 channels."""
        return F.relu(self.bn2(self.conv2(x)))


def _stage(in_channels: int, out_channels: int, units: int) -> nn.Sequential:
    rest = (SplitUnit(out_channels) for _ in range(units))
    return nn.Sequential(DownUnit(in_channels, out_channels), *rest)


def _rectify_and_interleave(halves_NCHW: Tensor) -> Tensor:
    # The kept half comes from a ReLU, so a second ReLU does not change it.
    return F.channel_shuffle(F.relu(halves_NCHW), 2)
