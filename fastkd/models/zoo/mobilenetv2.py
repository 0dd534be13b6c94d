"""MobileNetV2 for small images, in the two definitions that the papers use.

A stem, seven groups of inverted residual blocks (1x1 expansion, 3x3 depthwise, linear 1x1; added to
the input where stride and width stay), 1x1 to 1280 channels, global average pool, linear. Sandler
et al. 2018 (arXiv 1801.04381) table 2. What differs from it:

mobilenetv2_half    CRD's (RepDistiller, `mobile_half`): half width except the last 1280; stem 3x3
                    with stride 2; group strides 1, 1, 2, 2, 1, 2, 1; ReLU; no biases.
mobilenetv2         Demystification's (arXiv 2006.16589, tables 8 and 9; the network of
                    weiaicunzai/pytorch-cifar100): full width; stem 1x1 with padding 1, so 32
                    pixels become 34; strides 1, 2, 2, 2, 1, 1, 1; ReLU6; biased convolutions.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from fastkd.errors import UserError
from fastkd.models.blocks.layers import ResidualBlock, Shortcuts, init_convs, make_shortcut
from fastkd.models.zoo.staged import StagedNetwork, make_stage

__all__ = ["NAMES", "PATTERN", "InvertedResidual", "MobileNetV2", "build"]

NAMES = ("mobilenetv2", "mobilenetv2_half")
PATTERN = re.compile("|".join(NAMES))

WIDTHS = (16, 24, 32, 64, 96, 160, 320)
REPEATS = (1, 2, 3, 4, 3, 3, 1)
EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)
STRIDES = {"mobilenetv2": (1, 2, 2, 2, 1, 1, 1), "mobilenetv2_half": (1, 1, 2, 2, 1, 2, 1)}
STAGES = ((0, 1), (2,), (3, 4), (5, 6))
"""Groups of each stage, which ends where RepDistiller takes a feature."""

KEY_MAPS = {
    "RepDistiller": {r"classifier\.0": "fc"},
    "weiaicunzai": {
        "pre": "conv1",
        r"stage1\.residual": "blocks.0.0.conv",
        **{rf"stage{n}\.(\d)\.residual": rf"blocks.{n - 1}.\1.conv" for n in range(2, 7)},
        r"stage7\.residual": "blocks.6.0.conv",
        "conv1": "conv2",
        "conv2": "fc",
    },
}


def build(
    name: str, num_classes: int, *, block: str = "G(N)", shortcuts: Shortcuts = True
) -> "MobileNetV2":
    """Network by zoo name.

    block: S or G: the groups of the 3x3 convolutions, G(N) is depthwise. No layer is added.
    shortcuts: False leaves out every addition (Demystification's non-residual network).
    """
    return MobileNetV2(name, num_classes, block=block, shortcuts=shortcuts)


class InvertedResidual(ResidualBlock):
    """1x1 expansion, grouped 3x3 and a 1x1 without activation; added to the input where it fits."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        expansion: int,
        relu: type[nn.Module],
        bias: bool,
        block: str = "G(N)",
        shortcuts: Shortcuts = True,
    ) -> None:
        super().__init__()
        if self.block.kind not in ("S", "G"):
            raise UserError(
                f"block {self.block} does not fit an inverted residual block, which is already a "
                "bottleneck; use S, G(g), G(N/d) or G(N)"
            )
        inside = in_channels * expansion
        groups = self.block.count_groups(inside)
        self.shortcut = None
        if stride == 1 and in_channels == out_channels:
            self.shortcut = make_shortcut(shortcuts, in_channels, out_channels, 1, nn.Identity)
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, inside, 1, bias=bias),
            nn.BatchNorm2d(inside),
            relu(inplace=True),
            nn.Conv2d(inside, inside, 3, stride, padding=1, groups=groups, bias=bias),
            nn.BatchNorm2d(inside),
            relu(inplace=True),
            nn.Conv2d(inside, out_channels, 1, bias=bias),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H / stride, W / stride]."""
        out = self.conv(x_NCHW)
        return out if self.shortcut is None else out + self.shortcut(x_NCHW)


class MobileNetV2(StagedNetwork):
    """images [N, 3, H, W] -> logits [N, num_classes].

    A stage ends with a linear layer, so `stageN:preact` and `stageN` are the same.
    """

    num_stages = 4
    key_maps = KEY_MAPS

    def __init__(self, name: str, num_classes: int, **block_options: Any) -> None:
        super().__init__()
        half = name == "mobilenetv2_half"
        relu, bias = (nn.ReLU, False) if half else (nn.ReLU6, True)
        block = partial(InvertedResidual, relu=relu, bias=bias, **block_options)
        kernel, stride, before = (3, 2, 16) if half else (1, 1, 32)
        stem = nn.Conv2d(3, before, kernel, stride, padding=1, bias=bias)
        self.conv1 = nn.Sequential(stem, nn.BatchNorm2d(before), relu(inplace=True))
        self.blocks = nn.ModuleList()
        for width, repeats, expansion, stride in zip(
            WIDTHS, REPEATS, EXPANSIONS, STRIDES[name], strict=True
        ):
            after = width // 2 if half else width
            expanding = partial(block, expansion=expansion)
            self.blocks.append(make_stage(expanding, before, after, stride, repeats))
            before = after
        last = nn.Conv2d(before, 1280, 1, bias=bias)
        self.conv2 = nn.Sequential(last, nn.BatchNorm2d(1280), relu(inplace=True))
        self.fc = nn.Linear(1280, num_classes)
        if half:  # as RepDistiller does; weiaicunzai keeps torch's default initial weights
            init_convs(self)
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)

    @override
    def stage_paths(self) -> dict[str, tuple[str, ...]]:
        named = {f"stage{n}": groups for n, groups in enumerate(STAGES, start=1)}
        return {stage: tuple(f"blocks.{one}" for one in groups) for stage, groups in named.items()}

    def stem(self, images_NCHW: Tensor) -> Tensor:
        """Convolution, BN and the activation."""
        return self.conv1(images_NCHW)

    def layers(self, number: int) -> list[Callable[[Tensor], Tensor]]:
        """The groups of a stage."""
        return [self.blocks[group] for group in STAGES[number - 1]]

    def activate(self, preact: Tensor) -> Tensor:
        """Nothing: the last layer of a block is linear."""
        return preact

    def neck(self, x: Tensor) -> Tensor:
        """1x1 convolution to 1280 channels."""
        return self.conv2(x)
