"""CIFAR residual networks: resnet8/14/20/32/44/56/110 and the four times wider resnet8x4/32x4.

stem 3x3 conv, BN, ReLU -> three stages of n = (depth - 2) / 6 post-activation basic blocks, strides
1, 2, 2 -> global average pool -> linear. Where stride or width changes, the shortcut is a 1x1
convolution with BN. He et al. 2015 (arXiv 1512.03385) section 4.2, with the projection shortcuts
and the widths (x4: 32; 64, 128, 256) of RepDistiller's zoo; parameter names are RepDistiller's too.
`shortcuts="pad"` are those of the paper itself; cheap blocks as in Moonshine (arXiv 1711.02613).
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.models.blocks import ResidualBlock, Shortcuts, init_convs, make_shortcut, substitute
from fastkd.models.taps import ZooNetwork

__all__ = ["NAMES", "PATTERN", "BasicBlock", "CifarResNet", "build"]

NAMES = (
    *(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)),
    *("resnet8x4", "resnet32x4"),
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
    block: what stands for the 3x3 convolutions of the residual blocks (`models.block_grammar`).
    shortcuts: see `models.blocks.Shortcuts`.
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

    A bottleneck (B, BG) stands for both: bottleneck - BN, added, then ReLU.
    """

    shortcut_name: ClassVar[str] = "downsample"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        block: str = "S",
        shortcuts: Shortcuts = True,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            stride=stride,
            block=block,
            shortcuts=shortcuts,
        )
        self.conv1 = substitute(self.block, in_channels, out_channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2: nn.Module | None = None
        self.bn2: nn.Module | None = None
        if not self.block.is_bottleneck:
            self.conv2 = substitute(self.block, out_channels, out_channels)
            self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = make_shortcut(
            *(shortcuts, in_channels, out_channels, stride),
            lambda: nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            ),
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


class CifarResNet(ZooNetwork):
    """images [N, 3, H, W], H and W at least 4 -> logits [N, num_classes]."""

    tap_names = (
        *("stem", "stage1:preact", "stage1", "stage2:preact", "stage2", "stage3:preact", "stage3"),
        *("pooled", "logits"),
    )
    key_maps = KEY_MAPS

    def __init__(
        self, depth: int, widths: tuple[int, ...], num_classes: int, **block_options: Any
    ) -> None:
        super().__init__()
        blocks, stem, stage1, stage2, stage3 = (depth - 2) // 6, *widths
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _stage(stem, stage1, 1, blocks, block_options)
        self.layer2 = _stage(stage1, stage2, 2, blocks, block_options)
        self.layer3 = _stage(stage2, stage3, 2, blocks, block_options)
        self.fc = nn.Linear(stage3, num_classes)
        init_convs(self)

    def walk(self, x: Tensor, after: str = "images") -> Iterator[tuple[str, Tensor]]:
        """Taps in order; `stageN:preact` is the last residual sum of a stage before its ReLU."""
        done = ("images", "stem", "stage1", "stage2", "stage3", "pooled").index(after)
        if done < 1:
            x = F.relu(self.bn1(self.conv1(x)))
            yield "stem", x
        for number, stage in enumerate((self.layer1, self.layer2, self.layer3), start=1):
            if done > number:
                continue
            *blocks, last = cast(Iterable[BasicBlock], stage)
            for block in blocks:
                x = block(x)
            x = last.preact(x)
            yield f"stage{number}:preact", x
            x = F.relu(x)
            yield f"stage{number}", x
        if done < 5:
            x = F.adaptive_avg_pool2d(x, 1).flatten(1)
            yield "pooled", x
        yield "logits", self.fc(x)


def _stage(
    in_channels: int, out_channels: int, stride: int, blocks: int, options: dict[str, Any]
) -> nn.Sequential:
    rest = (BasicBlock(out_channels, out_channels, 1, **options) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(in_channels, out_channels, stride, **options), *rest)
