"""VGG for small images: vgg8, vgg11, vgg13, vgg16, vgg19.

Five blocks of 3x3 convolutions (with bias) + BN + ReLU of widths 64, 128, 256, 512, 512 -> global
average pool -> linear. 2x2 max pooling precedes blocks 1, 2 and 3, and block 4 only if its input
has at least 8 pixels a side, as for images of 64. Simonyan and Zisserman 2014 (arXiv
1409.1556) table 1, columns A, B, D, E, without the hidden linear layers; vgg8, the pooling and the
initial weights follow RepDistiller's zoo (its `vgg*_bn` builds).
"""

import re
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fastkd.models.blocks.layers import init_convs
from fastkd.models.zoo.staged import StagedNetwork

__all__ = ["NAMES", "PATTERN", "VGG", "build"]

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
NAMES = tuple(CONVOLUTIONS)
PATTERN = re.compile("|".join(NAMES))
KEY_MAPS = {"RepDistiller": {r"block(\d)": r"blocks.\1", "classifier": "fc"}}


def build(name: str, num_classes: int) -> "VGG":
    """Network by zoo name."""
    return VGG(CONVOLUTIONS[name], num_classes)


class VGG(StagedNetwork):
    """images [N, 3, H, W], H and W at least 8 -> logits [N, num_classes].

    Taps: `stem` is block 0, `stageN` block N, after the ReLU and before the pooling.
    """

    num_stages = 4
    key_maps = KEY_MAPS

    def __init__(self, convolutions: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        inputs = (3, *WIDTHS)
        self.blocks = nn.ModuleList(map(_block, inputs, WIDTHS, convolutions))
        self.fc = nn.Linear(WIDTHS[-1], num_classes)
        init_convs(self)
        nn.init.normal_(self.fc.weight, std=0.01)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    @override
    def stage_paths(self) -> dict[str, tuple[str, ...]]:
        return {f"stage{n}": (f"blocks.{n}",) for n in range(1, 5)}

    def stem(self, images_NCHW: Tensor) -> Tensor:
        """Block 0."""
        return F.relu(self.blocks[0](images_NCHW))

    def layers(self, number: int) -> list[Callable[[Tensor], Tensor]]:
        """Pooling, then block N up to its last BN."""
        return [_pool if number < 4 else _pool_large, self.blocks[number]]


def _pool(x_NCHW: Tensor) -> Tensor:
    return F.max_pool2d(x_NCHW, 2)


def _pool_large(x_NCHW: Tensor) -> Tensor:
    return _pool(x_NCHW) if x_NCHW.shape[-1] >= 8 else x_NCHW


def _block(in_channels: int, out_channels: int, convolutions: int) -> nn.Sequential:
    """Convolutions with BN and ReLU; the last ReLU is left to the walk."""
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
        in_channels = out_channels
    return nn.Sequential(*layers[:-1])
