"""Checkpoints in the layout of Moonshine's released code give its numbers here.

The states are drawn in the layout of BayesWatch/pytorch-moonshine and computed from their own
names, by torch's functions alone, in the order of the repository's blocks.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd.errors import UserError
from fastkd.models import create_model
from fastkd.storage.weights import load_into

State = dict[str, Tensor]
PLAIN, GROUPED, SQUEEZED = "Conv", "DConv", "ConvB"


class Theirs:
    """A state in their layout, drawn while it is first run, layer by layer."""

    def __init__(self, kind: str, *, groups: Callable[[int], int] = lambda _: 1, squeeze: int = 2):
        self.kind, self.groups, self.squeeze = kind, groups, squeeze
        self.state: State = {}
        self.random = torch.Generator().manual_seed(3)

    def draw(self, name: str, *shape: int, low: float = -0.5, high: float = 0.5) -> Tensor:
        if name not in self.state:
            drawn = torch.rand(*shape, generator=self.random, dtype=torch.float64)
            self.state[name] = low + (high - low) * drawn
        return self.state[name]

    def norm(self, name: str, x: Tensor) -> Tensor:
        num = x.shape[1]
        self.state.setdefault(f"{name}.num_batches_tracked", torch.tensor(5))
        return F.batch_norm(
            x,
            self.draw(f"{name}.running_mean", num),
            self.draw(f"{name}.running_var", num, low=0.5, high=2),
            self.draw(f"{name}.weight", num, low=0.5, high=1.5),
            self.draw(f"{name}.bias", num),
        )

    def conv(self, name: str, x: Tensor, out: int, side: int, **how: int) -> Tensor:
        shape = (out, x.shape[1] // how.get("groups", 1), side, side)
        scale = 1 / (shape[1] * side * side) ** 0.5
        weight = self.draw(f"{name}.weight", *shape, low=-scale, high=scale)
        return F.conv2d(x, weight, **how)

    def cheap(self, name: str, x: Tensor, out: int, stride: int) -> Tensor:
        if self.kind == PLAIN:
            return self.conv(f"{name}.conv", x, out, 3, stride=stride, padding=1)
        if self.kind == "Conv2x2":
            return self.conv(f"{name}.conv", x, out, 2, stride=stride, padding=1, dilation=2)
        inner = {"stride": stride, "padding": 1}
        if self.kind == GROUPED:
            num = x.shape[1]
            x = self.conv(f"{name}.convdw", x, num, 3, groups=self.groups(num), **inner)
            return self.conv(f"{name}.conv1x1", self.norm(f"{name}.bn", x).relu(), out, 1)
        num = out // self.squeeze
        x = self.norm(f"{name}.bn1", self.conv(f"{name}.conv1x1_down", x, num, 1)).relu()
        spatial = "convdw" if self.groups(num) == num else "conv"
        x = self.conv(f"{name}.{spatial}", x, num, 3, groups=self.groups(num), **inner)
        return self.conv(f"{name}.conv1x1_up", self.norm(f"{name}.bn2", x).relu(), out, 1)

    def wide_block(self, name: str, x: Tensor, out: int, stride: int, pair: bool) -> Tensor:
        active = self.norm(f"{name}.bn1", x).relu()
        branch = self.cheap(f"{name}.conv1", active, out, stride)
        if pair:
            branch = self.norm(f"{name}.bn2", branch).relu()
            branch = self.cheap(f"{name}.conv2", branch, out, 1)
        if x.shape[1] == out:
            return x + branch
        return self.conv(f"{name}.convShortcut", active, out, 1, stride=stride) + branch

    def wide(self, x: Tensor, blocks: int, width: int, *, parts: int = 1, pair: bool = True):
        x = self.conv("conv1", x, 16, 3, padding=1)
        for stage in (1, 2, 3):
            for number in range(blocks):
                part, inside = divmod(number, blocks // parts)
                stride = 2 if stage > 1 and number == 0 else 1
                name = f"block{stage}.{part}.layer.{inside}"
                x = self.wide_block(name, x, 8 * 2**stage * width, stride, pair)
        return self.head(self.norm("bn1", x).relu())

    def deep(self, x: Tensor, blocks: tuple[int, ...]) -> Tensor:
        x = self.norm("bn1", self.conv("conv1", x, 64, 7, stride=2, padding=3)).relu()
        x = F.max_pool2d(x, 3, 2, 1)
        for stage, (num, out) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), 1):
            for number in range(num):
                name = f"layer{stage}.0.layer.{number}"
                stride = 2 if stage > 1 and number == 0 else 1
                y = self.norm(f"{name}.bn1", self.cheap(f"{name}.conv1", x, out, stride)).relu()
                y = self.norm(f"{name}.bn2", self.cheap(f"{name}.conv2", y, out, 1))
                if stride > 1:
                    x = self.conv(f"{name}.downsample.0", x, out, 1, stride=stride)
                    x = self.norm(f"{name}.downsample.1", x)
                x = (x + y).relu()
        return self.head(x)

    def head(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3))
        return F.linear(
            pooled, self.draw("fc.weight", 10, pooled.shape[1]), self.draw("fc.bias", 10)
        )

    def save(self, file: Path) -> Path:
        """As their main.py does, losses and arguments beside."""
        net = {k: v.float() if v.is_floating_point() else v for k, v in self.state.items()}
        content = {
            "net": net,
            "epoch": 199,
            "width": 2.0,
            "depth": 10,
            "conv": self.kind,
            "blocktype": "Basic",
            "module": None,
            "train_losses": [0.5],
            "train_errors": [torch.tensor(3.0)],
            "val_losses": [0.5],
            "val_errors": [torch.tensor(4.0)],
        }
        torch.save(content, file)
        return file


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_equal(model: nn.Module, expected: Tensor, images: Tensor = IMAGES) -> None:
    with torch.no_grad():
        found = model.double().eval()(images)
    # Their weights went through a file in fp32.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


WIDE = {
    "Conv": (Theirs(PLAIN), "S", True),
    "Conv2x2": (Theirs("Conv2x2"), "S-2x2", True),
    "DConv": (Theirs(GROUPED, groups=lambda n: n), "G(N)", True),
    "DConvG4": (Theirs(GROUPED, groups=lambda n: n // 4), "G(N/4)", True),
    "DConvA8": (Theirs(GROUPED, groups=lambda _: 8), "G(8)", True),
    "ConvB2, Bottle": (Theirs(SQUEEZED), "B(2)", False),
    "ConvB4, Bottle": (Theirs(SQUEEZED, squeeze=4), "B(4)", False),
    "DConvB2, Bottle": (Theirs(SQUEEZED, groups=lambda n: n), "BG(2,M)", False),
    "G8B2, Bottle": (Theirs(SQUEEZED, groups=lambda n: n // 8), "BG(2,M/8)", False),
    "A4B2, Bottle": (Theirs(SQUEEZED, groups=lambda _: 4), "BG(2,4)", False),
}


@pytest.mark.parametrize("conv", WIDE)
def test_wide_residual_networks(conv: str, tmp_path: Path) -> None:
    theirs, block, pair = WIDE[conv]
    expected = theirs.wide(IMAGES, 2, 2, pair=pair)
    file = theirs.save(tmp_path / "student.t7")
    assert_equal(create_model("wrn_16_2", 10, weights=file, block=block), expected)


def test_stages_in_several_parts_are_numbered_on(tmp_path: Path) -> None:
    theirs = Theirs(PLAIN)
    expected = theirs.wide(IMAGES, 4, 1, parts=2)
    file = theirs.save(tmp_path / "split.t7")
    assert_equal(create_model("wrn_28_1", 10, weights=file), expected)


@pytest.mark.parametrize("depth", [18, 34])
def test_imagenet_networks(depth: int, tmp_path: Path) -> None:
    theirs = Theirs(GROUPED, groups=lambda n: n)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = theirs.deep(images, {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}[depth])
    file = theirs.save(tmp_path / "imagenet.t7")
    model = create_model(f"resnet{depth}", 10, weights=file, stem="imagenet", block="G(N)")
    assert_equal(model, expected, images)


def test_a_bottleneck_for_each_convolution(tmp_path: Path) -> None:
    """What the repository's README trains: the default blocktype, which the zoo does not have."""
    theirs = Theirs(SQUEEZED, groups=lambda n: n // 8)
    expected = theirs.wide(IMAGES, 2, 2)
    file = theirs.save(tmp_path / "g8b2.t7")
    with pytest.raises(UserError, match="unexpected"):
        create_model("wrn_16_2", 10, weights=file, block="BG(2,M/8)")
    model = create_model("wrn_16_2", 10)
    for conv in ("conv1", "conv2"):
        model = fastkd.cheapen(model, "BG(2,M/8)", where=f"layer?.*.{conv}")
    load_into(model, file)
    assert_equal(model, expected)
