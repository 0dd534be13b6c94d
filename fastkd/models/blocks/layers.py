"""The cheap substitutes for a 3x3 convolution as layers, and the residual block that takes them.

Built by the families of the zoo (`block=`, `shortcuts=`) and by `models.rewrite` in any network.
Moonshine (Crowley, Gray, Storkey 2018, arXiv 1711.02613) table 1 and its released code: the stride
is on the spatial convolution; G changes the channels in its last convolution, B and BG in their
first; nothing follows the last convolution, because the network normalises the output anyway.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.models.blocks.grammar import Block, parse_block

__all__ = [
    "PAPER_STYLE",
    "Bottleneck",
    "GroupedPointwise",
    "PaddedShortcut",
    "ResidualBlock",
    "Shortcuts",
    "Style",
    "init_convs",
    "make_shortcut",
    "norm_projection",
    "substitute",
]

Shortcuts = bool | Literal["pad", "projection"]
"""True: identity, and a projection where the shape changes. "pad": subsampling and zero channels
instead of the projection (He et al. 2015, option A). "projection": only the projections, as in
JointRD's released code. False: none, a plain network."""


@dataclass(frozen=True, slots=True)
class Style:
    """The layers between the convolutions of a substitute; each is made from its channel count."""

    norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d
    """None leaves the normalisation out and gives inner convolutions the outer one's bias."""
    activation: Callable[[int], nn.Module] = lambda channels: nn.ReLU()

    def make_norm(self, channels: int) -> nn.Module:
        """The normalisation for this number of channels, or nothing."""
        return nn.Identity() if self.norm is None else self.norm(channels)


PAPER_STYLE = Style()


class GroupedPointwise(nn.Module):
    """G: grouped 3x3 (in -> in), norm, activation, 1x1 (in -> out).

    Takes [N, in, H, W]; height and width change as in the convolution that it replaces.

    Args:
        groups: of the spatial convolution; must divide in_channels.
        bias: of the last convolution.
        spatial: kernel_size, stride, padding, dilation, padding_mode as of nn.Conv2d.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        *,
        style: Style = PAPER_STYLE,
        bias: bool = False,
        **spatial: Any,
    ) -> None:
        super().__init__()
        inner = bias and style.norm is None
        self.grouped = nn.Conv2d(in_channels, in_channels, groups=groups, bias=inner, **spatial)
        self.norm = style.make_norm(in_channels)
        self.activation = style.activation(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H', W'], not normalised."""
        return self.pointwise(self.activation(self.norm(self.grouped(x_NCHW))))


class Bottleneck(nn.Module):
    """B, BG: 1x1 (in -> M), norm, activation, 3x3 (M -> M), norm, activation, 1x1 (M -> out).

    Arguments as in `GroupedPointwise`; `width` is M and `groups` are the groups of the 3x3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        groups: int = 1,
        *,
        style: Style = PAPER_STYLE,
        bias: bool = False,
        **spatial: Any,
    ) -> None:
        super().__init__()
        inner = bias and style.norm is None
        self.reduce = nn.Conv2d(in_channels, width, 1, bias=inner)
        self.norm1 = style.make_norm(width)
        self.activation1 = style.activation(width)
        self.spatial = nn.Conv2d(width, width, groups=groups, bias=inner, **spatial)
        self.norm2 = style.make_norm(width)
        self.activation2 = style.activation(width)
        self.expand = nn.Conv2d(width, out_channels, 1, bias=bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H', W'], not normalised."""
        x = self.activation1(self.norm1(self.reduce(x_NCHW)))
        return self.expand(self.activation2(self.norm2(self.spatial(x))))


def substitute(
    block: Block,
    in_channels: int,
    out_channels: int,
    *,
    style: Style = PAPER_STYLE,
    bias: bool = False,
    **spatial: Any,
) -> nn.Module:
    """The substitute for one 3x3 convolution in -> out, by default padded by 1; see `init_convs`.

    spatial: its stride, padding, dilation, padding_mode and, for other kernels, kernel_size, as
        nn.Conv2d takes them.
    Raises UserError if the groups or the bottleneck do not divide the channels.
    """
    spatial = {"kernel_size": 3, "padding": 1} | spatial
    if block.kind == "S":
        return nn.Conv2d(in_channels, out_channels, bias=bias, **spatial)
    if block.kind == "S-2x2":
        return nn.Conv2d(in_channels, out_channels, bias=bias, **_two_by_two(spatial))
    inside: dict[str, Any] = {"style": style, "bias": bias} | spatial
    if block.kind == "G":
        groups = block.count_groups(in_channels)
        return GroupedPointwise(in_channels, out_channels, groups, **inside)
    width = block.width(out_channels)
    return Bottleneck(in_channels, out_channels, width, block.count_groups(width), **inside)


def _two_by_two(spatial: dict[str, Any]) -> dict[str, Any]:
    """Four taps at the corners of the 3x3 window: the same reach, so the same output size."""
    if spatial["kernel_size"] not in (3, (3, 3)):
        raise UserError(
            f"block S-2x2 replaces 3x3 convolutions, got kernel size {spatial['kernel_size']}"
        )
    dilation = spatial.get("dilation", 1)
    twice = 2 * dilation if isinstance(dilation, int) else tuple(2 * each for each in dilation)
    return spatial | {"kernel_size": 2, "dilation": twice}


def init_convs(module: nn.Module) -> nn.Module:
    """Normal weights of variance 2 / (k * k * out), whatever the groups, as in the papers' code.

    Biases, which the papers do not use, keep torch's default. Returns `module`.
    """
    for each in module.modules():
        if isinstance(each, nn.Conv2d):
            nn.init.kaiming_normal_(each.weight, mode="fan_out", nonlinearity="relu")
    return module


class PaddedShortcut(nn.Module):
    """Every stride-th pixel, with zero channels added on both sides: a shortcut without weights."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (out_channels - in_channels) // 2
        self.padding = (before, out_channels - in_channels - before)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, ceil(H / stride), ceil(W / stride)]."""
        return F.pad(x_NCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.padding))


def make_shortcut(
    shortcuts: Shortcuts,
    in_channels: int,
    out_channels: int,
    stride: int,
    projection: Callable[[int, int, int], nn.Module],
) -> nn.Module | None:
    """nn.Identity, a projection, a PaddedShortcut, or None if nothing is added.

    projection: makes one from in_channels, out_channels and stride.
    """
    if shortcuts not in (True, False, "pad", "projection"):
        raise UserError(f"shortcuts={shortcuts!r}: expected True, False, 'pad' or 'projection'")
    if shortcuts is False:
        return None
    if stride == 1 and in_channels == out_channels:
        return None if shortcuts == "projection" else nn.Identity()
    if shortcuts == "pad":
        return PaddedShortcut(in_channels, out_channels, stride)
    return projection(in_channels, out_channels, stride)


def norm_projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """A 1x1 convolution with batch norm: the projection of post-activation networks."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class ResidualBlock(nn.Module):
    """Base of the zoo's residual blocks: what `cheapen` and `remove_shortcuts` need from them.

    The constructor of a subclass has the arguments `block` (a name) and `shortcuts`; all its
    arguments are recorded, so that the block can be rebuilt. The network that holds it initialises
    its convolutions (`init_convs`).
    """

    shortcut_name: ClassVar[str] = "shortcut"
    """The child that is added to the branch: nn.Identity, a projection, or None for nothing."""

    ways_to_run: ClassVar[tuple[str, ...]] = ()
    """Methods besides `forward` through which a network runs the block."""

    arguments: dict[str, Any]
    """The constructor's arguments by name, including defaults."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = _recording(cls.__init__)

    def __init__(self) -> None:
        super().__init__()
        self.block = parse_block(self.arguments["block"])

    @property
    def keeps_shape(self) -> bool:
        """Whether its output has the shape of its input, whatever the image."""
        given = self.arguments
        same = given.get("in_channels") == given.get("out_channels")
        return same and given.get("stride", 1) == 1

    def rebuilt(self, block: str) -> Self:
        """The same residual block with another cheap block in it.

        Layers whose weights have the same names and shapes are moved into it; the others are
        initialised, on the device and in the dtype of this block.
        Raises UserError if the layers have changed since the block was built.
        """
        kind, first = type(self), next(self.parameters())
        with torch.device("meta"):
            if _shapes(kind(**self.arguments)) != _shapes(self):
                raise UserError(
                    f"this {kind.__name__} was altered after it was built (fused, or part of it "
                    "replaced): make a network cheap before that"
                )
        with torch.device(first.device):
            new = kind(**self.arguments | {"block": block})
        init_convs(new).to(first.dtype).train(self.training)
        layers = dict(self.named_modules())
        for path, fresh in list(new.named_modules()):
            is_layer = not fresh._modules and bool(_shapes(fresh))
            if is_layer and path in layers and _shapes(fresh) == _shapes(layers[path]):
                new.set_submodule(path, layers[path])
        return new

    def remove_shortcut(self) -> None:
        """Reduce the block to its branch, as with `shortcuts=False`."""
        delattr(self, self.shortcut_name)
        setattr(self, self.shortcut_name, None)
        self.arguments = self.arguments | {"shortcuts": False}


def _recording(construct: Callable[..., None]) -> Callable[..., None]:
    """The same constructor, which first records its arguments in `self.arguments`."""
    signature = inspect.signature(construct)

    @functools.wraps(construct)
    def construct_and_record(self: ResidualBlock, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        _, *given = bound.arguments.items()
        # If one constructor calls another, the outer one's arguments rebuild the block.
        vars(self).setdefault("arguments", dict(given))
        construct(self, *args, **kwargs)

    return construct_and_record


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in module.state_dict().items()}
