"""ERFNet, a network for semantic segmentation, and its cheap student of Moonshine.

Layers: 1, 2 down (to 16, 64 channels); 3-7 residual blocks; 8 down (128); 9-16 residual blocks with
dilations 2, 4, 8, 16 twice; 17 up (64); 18, 19 residual; 20 up (16); 21, 22 residual; then a 2x2
transposed convolution of stride 2 to the classes. Romera et al. 2018 (IEEE T-ITS 19(1)) table I.
Its encoder, layers 1 to 16, is trained first, with a 1x1 convolution to the classes of its own:
that is `erfnet_encoder`. A residual block has two pairs of convolutions, 3x1 then 1x3, biased;
Moonshine (arXiv 1711.02613, section 5.2 and table 4) replaces each pair by one cheap block without
bias, G(N) in its table. Taps: the ends of layers 1 (stem), 7, 12, 16, and of 19, 22 in the decoder.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from fastkd.errors import UserError
from fastkd.models.blocks.grammar import Block
from fastkd.models.blocks.layers import (
    ResidualBlock,
    Shortcuts,
    Style,
    init_convs,
    make_shortcut,
    substitute,
)
from fastkd.models.taps import ZooNetwork
from fastkd.models.zoo.encoder import Encoder
from fastkd.storage.foreign_checkpoints import KeyMap

__all__ = ["ENCODERS", "NAMES", "PATTERN", "ERFNet", "ERFNetEncoder", "build"]

NAMES = ("erfnet", "erfnet_encoder")
PATTERN = re.compile("|".join(NAMES))
ENDS = {"images": 0, "stem": 1, "stage1": 7, "stage2": 12, "stage3": 16, "stage4": 19, "stage5": 22}
"""Tap -> the layer that outputs it."""

_IN_ENCODER, _IN_DECODER = 16, 6
_OF_ENCODER = {rf"encoder\.layers\.{n}": f"layers.{n + 1}" for n in range(_IN_ENCODER - 1)}
_OF_DECODER = {rf"decoder\.layers\.{n}": f"layers.{n + _IN_ENCODER}" for n in range(_IN_DECODER)}
_PAIRS = {
    "conv3x1_1": "pair1.0",
    "conv1x3_1": "pair1.2",
    "conv3x1_2": "pair2.0",
    "conv1x3_2": "pair2.2",
}


def _renamed(layers: dict[str, str]) -> dict[str, str | None]:
    """Eromera's names of the layers -> ours."""
    pairs = {
        rf"{layer}\.{conv}": f"{ours}.{part}"
        for layer, ours in layers.items()
        for conv, part in _PAIRS.items()
    }
    return {r"encoder\.initial_block": "layers.0", **pairs, **layers}


_norm = partial(nn.BatchNorm2d, eps=1e-3)


def build(name: str, num_classes: int, *, block: str = "S") -> "ERFNet | ERFNetEncoder":
    """Network by zoo name; Eromera's for the 19 classes of Cityscapes have `num_classes=20`.

    block: substitute for each pair of convolutions (`blocks.grammar`); S is the pair itself.
    """
    return ERFNet(num_classes, block) if name == "erfnet" else ERFNetEncoder(num_classes, block)


class _Layered(ZooNetwork):
    """A list of layers, some of whose ends are taps, and a head."""

    head_path = "head"
    layers: nn.ModuleList
    head: nn.Module

    @override
    def stage_paths(self) -> dict[str, tuple[str, ...]]:
        ends = [end for tap, end in ENDS.items() if tap in self.tap_names]
        return {
            f"stage{n}": tuple(f"layers.{layer}" for layer in range(*between))
            for n, between in enumerate(pairwise(ends), start=1)
        }

    def walk(self, x: Tensor, after: str = "images") -> Iterator[tuple[str, Tensor]]:
        """Taps in order; `stageN:preact` is the residual sum before the last ReLU of the stage."""
        if after == "images" and (x.shape[-2] % 8 or x.shape[-1] % 8):
            raise UserError(
                f"erfnet: images of {x.shape[-2]}x{x.shape[-1]} pixels; height and width must be "
                "multiples of 8, crop or pad them"
            )
        # A block that was left out (`rewrite.shorten`) has an identity in its place.
        names = {self._last(ENDS[tap]): tap for tap in self.tap_names if tap in ENDS}
        for number in range(ENDS[after] + 1, len(self.layers) + 1):
            layer, tap = self.layers[number - 1], names.get(number)
            if tap is None or not isinstance(layer, ResidualBlock1d):
                x = layer(x)
            else:
                x = layer.preact(x)
                yield f"{tap}:preact", x
                x = F.relu(x)
            if tap is not None:
                yield tap, x
        yield "logits", self.head(x)

    def _last(self, number: int) -> int:
        """The last layer that computes something, up to this one."""
        while number and isinstance(self.layers[number - 1], nn.Identity):
            number -= 1
        return number


class ERFNetEncoder(_Layered):
    """images [N, 3, H, W], H and W multiples of 8 -> logits [N, num_classes, H / 8, W / 8]."""

    tap_names = (
        "stem",
        "stage1:preact",
        "stage1",
        "stage2:preact",
        "stage2",
        "stage3:preact",
        "stage3",
        "logits",
    )
    key_maps: ClassVar[Mapping[str, KeyMap]] = {
        "Eromera": {**_renamed(_OF_ENCODER), r"encoder\.output_conv": "head", "decoder": None}
    }

    def __init__(self, num_classes: int, block: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_encoder(block))
        self.head = nn.Conv2d(128, num_classes, 1)


class ERFNet(_Layered):
    """images [N, 3, H, W], H and W multiples of 8 -> logits [N, num_classes, H, W]."""

    tap_names = (
        *ERFNetEncoder.tap_names[:-1],
        "stage4:preact",
        "stage4",
        "stage5:preact",
        "stage5",
        "logits",
    )
    key_maps: ClassVar[Mapping[str, KeyMap]] = {
        "Eromera": {
            **_renamed(_OF_ENCODER | _OF_DECODER),
            r"encoder\.output_conv": None,
            r"decoder\.output_conv": "head",
        }
    }

    def __init__(self, num_classes: int, block: str) -> None:
        super().__init__()
        residual = partial(ResidualBlock1d, block=block)
        self.layers = nn.ModuleList(_encoder(block))
        self.layers.extend([Up(128, 64), residual(64, 1, 0), residual(64, 1, 0)])
        self.layers.extend([Up(64, 16), residual(16, 1, 0), residual(16, 1, 0)])
        self.head = nn.ConvTranspose2d(16, num_classes, 2, stride=2)


ENCODERS = {
    "erfnet": Encoder("erfnet_encoder", ERFNetEncoder.tap_names, tuple(_OF_DECODER.values()))
}


class Down(nn.Module):
    """[N, in, H, W] -> [N, out, H / 2, W / 2]: convolution and pooling, concatenated, BN, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels - in_channels, 3, stride=2, padding=1)
        self.bn = _norm(out_channels)

    @override
    def forward(self, x_NCHW: Tensor) -> Tensor:
        halves = self.conv(x_NCHW), F.max_pool2d(x_NCHW, 2)
        return F.relu(self.bn(torch.cat(halves, dim=1)))


class Up(nn.Module):
    """[N, in, H, W] -> [N, out, 2 * H, 2 * W]: a transposed 3x3 convolution, BN, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(
            in_channels, out_channels, 3, stride=2, padding=1, output_padding=1
        )
        self.bn = _norm(out_channels)

    @override
    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_NCHW)))


class ResidualBlock1d(ResidualBlock):
    """[N, C, H, W] -> the same: pair, BN, ReLU, dilated pair, BN, dropout, added, ReLU."""

    ways_to_run: ClassVar[tuple[str, ...]] = ("preact",)

    def __init__(
        self,
        channels: int,
        dilation: int,
        dropout: float,
        *,
        block: str = "S",
        shortcuts: Shortcuts = True,
    ) -> None:
        super().__init__()
        self.pair1 = _pair(channels, 1, self.block)
        self.bn1 = _norm(channels)
        self.pair2 = _pair(channels, dilation, self.block)
        self.bn2 = _norm(channels)
        self.dropout = nn.Dropout2d(dropout)
        self.shortcut = make_shortcut(shortcuts, channels, channels, 1, nn.Identity)

    def preact(self, x_NCHW: Tensor) -> Tensor:
        """The sum before the last ReLU."""
        out = self.bn2(self.pair2(F.relu(self.bn1(self.pair1(x_NCHW)))))
        out = self.dropout(out)
        return out if self.shortcut is None else out + self.shortcut(x_NCHW)

    @override
    def forward(self, x_NCHW: Tensor) -> Tensor:
        return F.relu(self.preact(x_NCHW))


def _encoder(block: str) -> Iterator[nn.Module]:
    """Layers 1 to 16."""
    yield from (Down(3, 16), Down(16, 64))
    yield from (ResidualBlock1d(64, 1, 0.03, block=block) for _ in range(5))
    yield Down(64, 128)
    yield from (ResidualBlock1d(128, d, 0.3, block=block) for d in (2, 4, 8, 16) * 2)


def _pair(channels: int, dilation: int, block: Block) -> nn.Module:
    """3x1, ReLU, 1x3, or the cheap block that replaces both."""
    if block.kind != "S":
        style = Style(norm=_norm)
        cheap = substitute(
            block, channels, channels, style=style, padding=dilation, dilation=dilation
        )
        return init_convs(cheap)
    vertical = nn.Conv2d(channels, channels, (3, 1), padding=(dilation, 0), dilation=(dilation, 1))
    across = nn.Conv2d(channels, channels, (1, 3), padding=(0, dilation), dilation=(1, dilation))
    return nn.Sequential(vertical, nn.ReLU(inplace=True), across)
