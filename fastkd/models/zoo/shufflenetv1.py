"""ShuffleNet (version 1) with three groups, for small images.

1x1 conv to 24 channels, BN, ReLU -> three stages of 4, 8, 4 units, 240, 480, 960 channels -> global
average pool -> linear. A unit: grouped 1x1 to a quarter of its width, shuffle, depthwise 3x3,
grouped 1x1; the first of a stage has stride 2 and is concatenated with its input, average pooled
3x3, the others are added to their input; then ReLU. Zhang et al. 2018 (arXiv 1707.01083) table 1,
g = 3; the stem, and the ReLU after the depthwise convolution, follow RepDistiller's zoo.
"""

import re
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fastkd.models.zoo.staged import StagedNetwork, make_stage

__all__ = ["NAMES", "PATTERN", "ShuffleNetV1", "Unit", "build"]

NAMES = ("shufflenetv1",)
PATTERN = re.compile(NAMES[0])
KEY_MAPS = {"RepDistiller": {"linear": "fc"}}
STEM, WIDTHS, UNITS, GROUPS = 24, (240, 480, 960), (4, 8, 4), 3


def build(name: str, num_classes: int) -> "ShuffleNetV1":
    """Network by zoo name."""
    return ShuffleNetV1(num_classes)


class Unit(nn.Module):
    """[N, in, H, W] -> [N, out, H / stride, W / stride]; stride 2 concatenates, 1 adds."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        made = out_channels - in_channels if stride == 2 else out_channels
        inside = made // 4
        self.stride = stride
        # The few channels of the stem are not split.
        self.groups = 1 if in_channels == STEM else GROUPS
        self.conv1 = nn.Conv2d(in_channels, inside, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv2 = nn.Conv2d(inside, inside, 3, stride, padding=1, groups=inside, bias=False)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv3 = nn.Conv2d(inside, made, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(made)

    @property
    def keeps_shape(self) -> bool:
        """Whether the output has the shape of the input."""
        return self.stride == 1

    def preact(self, x_NCHW: Tensor) -> Tensor:
        """The sum or concatenation before the last ReLU."""
        out = F.channel_shuffle(F.relu(self.bn1(self.conv1(x_NCHW))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        if self.stride == 1:
            return out + x_NCHW
        return torch.cat((out, F.avg_pool2d(x_NCHW, 3, stride=2, padding=1)), dim=1)

    @override
    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.relu(self.preact(x_NCHW))


class ShuffleNetV1(StagedNetwork):
    """images [N, 3, H, W] -> logits [N, num_classes]."""

    num_stages = 3
    key_maps = KEY_MAPS

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        stages = map(partial(make_stage, Unit), (STEM, *WIDTHS), WIDTHS, (2, 2, 2), UNITS)
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(WIDTHS[-1], num_classes)
