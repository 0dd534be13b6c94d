"""ResNet-18 and 34, and the plain CNNs with the same layers and no shortcuts.

stem -> four stages of basic blocks (2, 2, 2, 2 or 3, 4, 6, 3), 64, 128, 256, 512 channels, strides
1, 2, 2, 2 -> global average pool -> linear. He et al. 2015 (arXiv 1512.03385) table 1; parameter
names are torchvision's. The stems:

cifar             3x3 convolution, BN, ReLU: Demystification, JointRD, RepDistiller
imagenet          7x7 convolution of stride 2, BN, ReLU, then 3x3 max pooling of stride 2
imagenet-nopool   the same without pooling: the other reading of what AlignKD used for CIFAR

plain18 and plain34 are the students of AlignKD. JointRD's released code keeps the 1x1 projections
where the shape changes: `shortcuts="projection"`. Cheap blocks as in Moonshine (arXiv 1711.02613,
table 3), whose Res18-0.5 is `width=0.5`.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.models.blocks.layers import Shortcuts, init_convs
from fastkd.models.blocks.moonshine_names import moonshine_names
from fastkd.models.zoo.resnet import BasicBlock
from fastkd.models.zoo.staged import StagedNetwork, make_stage

__all__ = ["KEY_MAPS", "NAMES", "PATTERN", "ResNet18", "build"]

NAMES = ("resnet18", "resnet34", "plain18", "plain34")
PATTERN = re.compile("|".join(NAMES))
BLOCKS = {"18": (2, 2, 2, 2), "34": (3, 4, 6, 3)}
WIDTHS, STRIDES = (64, 128, 256, 512), (1, 2, 2, 2)
STEMS = ("cifar", "imagenet", "imagenet-nopool")

_BRANCH = {0: "conv1", 1: "bn1", 3: "conv2", 4: "bn2", 6: "conv3", 7: "bn3"}
KEY_MAPS = {
    "RepDistiller": {r"(layer\d\.\d+)\.shortcut": r"\1.downsample", "linear": "fc"},
    "weiaicunzai": {
        r"conv1\.0": "conv1",
        r"conv1\.1": "bn1",
        **{
            rf"conv{stage + 1}_x\.(\d+)\.residual_function\.{index}": rf"layer{stage}.\1.{layer}"
            for stage in (1, 2, 3, 4)
            for index, layer in _BRANCH.items()
        },
        **{
            rf"conv{stage + 1}_x\.(\d+)\.shortcut": rf"layer{stage}.\1.downsample"
            for stage in (1, 2, 3, 4)
        },
    },
    "pytorch-moonshine": moonshine_names,
}
"""Also used by ResNet-50."""


def build(
    name: str,
    num_classes: int,
    *,
    stem: str = "cifar",
    width: float = 1.0,
    block: str = "S",
    shortcuts: Shortcuts | None = None,
) -> "ResNet18":
    """Network by zoo name.

    stem: `cifar`, `imagenet` or `imagenet-nopool`, see the head of this file.
    width: factor on the channels of stages 2, 3 and 4; the stem and stage 1 keep 64.
    block: substitute for the 3x3 convolutions of the residual blocks (`blocks.grammar`).
    shortcuts: see `blocks.layers.Shortcuts`; by default True for resnetN and False for plainN,
        which accepts "projection" too.
    """
    if stem not in STEMS:
        raise UserError(f"{name}: stem={stem!r}; expected one of {', '.join(STEMS)}")
    widths = (WIDTHS[0], *(round(channels * width) for channels in WIDTHS[1:]))
    if min(widths) < 1:
        raise UserError(f"{name}: width={width} leaves no channels; use a larger width")
    plain = name.startswith("plain")
    if shortcuts is None:
        shortcuts = not plain
    elif plain and shortcuts not in (False, "projection"):
        raise UserError(
            f"{name} has no shortcuts, got shortcuts={shortcuts!r}; expected False or "
            f"'projection', or build {name.replace('plain', 'resnet')}"
        )
    blocks = BLOCKS[name[-2:]]
    return ResNet18(blocks, widths, num_classes, stem, block=block, shortcuts=shortcuts)


class ResNet18(StagedNetwork):
    """images [N, 3, H, W] -> logits [N, num_classes]; of any depth that `blocks` gives."""

    num_stages = 4
    key_maps = KEY_MAPS

    def __init__(
        self,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        num_classes: int,
        stem: str,
        **block_options: Any,
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.conv1 = nn.Conv2d(3, widths[0], kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        block = partial(BasicBlock, **block_options)
        stages = map(partial(make_stage, block), (widths[0], *widths), widths, STRIDES, blocks)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(widths[-1], num_classes)
        init_convs(self)

    def layers(self, number: int) -> list[Callable[[Tensor], Tensor]]:
        """Blocks; the pooling of the stem comes after the `stem` tap."""
        pooling = [self.maxpool] if number == 1 else []
        return [*pooling, *super().layers(number)]
