"""`remove_shortcuts`: a residual network made plain, in a copy.

Three ways. All shortcuts go (the non-residual networks of Demystification, Jha et al. 2020, arXiv
2006.16589; AlignKD's plain CNNs). Or projections stay and only identities go (JointRD's released
code). Or the function stays exactly as it is and the network grows (`rewrite.exact`).
Called by users and by `create_model(shortcuts=..)` for networks that lack the option.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from fastkd.errors import UserError
from fastkd.models.blocks.layers import PaddedShortcut, ResidualBlock
from fastkd.models.report import RewriteReport
from fastkd.models.rewrite.exact import reserved_block
from fastkd.models.rewrite.result import copied, finish

__all__ = ["remove_shortcuts"]


class _Layout(NamedTuple):
    """Names in a foreign residual block."""

    shortcut: str
    """Where its projection is."""
    branch: tuple[str, ...]
    """Its layers in execution order, without stochastic depth and the addition."""
    without: str | None = "identity"
    """What is added if there is no projection."""


LAYOUTS = {
    "torchvision.models.resnet.BasicBlock": _Layout(
        "downsample", ("conv1", "bn1", "relu", "conv2", "bn2", "relu")
    ),
    "torchvision.models.resnet.Bottleneck": _Layout(
        "downsample", ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3", "relu")
    ),
    "torchvision.models.regnet.ResBottleneckBlock": _Layout("proj", ("f", "activation")),
    "timm.models.resnet.BasicBlock": _Layout(
        "downsample",
        ("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2", "se", "act2"),
    ),
    "timm.models.resnet.Bottleneck": _Layout(
        "downsample",
        (
            "conv1",
            "bn1",
            "act1",
            "conv2",
            "bn2",
            "drop_block",
            "act2",
            "aa",
            "conv3",
            "bn3",
            "se",
            "act3",
        ),
    ),
    "timm.models.regnet.Bottleneck": _Layout(
        "downsample", ("conv1", "conv2", "se", "conv3", "act3"), without=None
    ),
}
SWITCHES = ("use_res_connect", "has_skip")
"""Attributes by which inverted residual blocks of torchvision and timm turn their shortcut on."""


def remove_shortcuts(
    model: nn.Module, keep_projection: bool = False, *, exact: bool = False
) -> nn.Module:
    """A copy of a residual network without its shortcuts; the remaining weights are unchanged.

    keep_projection: keep blocks whose shortcut is a 1x1 convolution; remove only identities.
    exact: keep the function instead. The block's input passes through its convolutions in reserved
        channels and is added by the last of them (RMNet, arXiv 2111.00687): equal logits in
        evaluation mode and no shortcut, for 1.8 times the parameters and multiply-accumulates in
        ResNet-18, 11 times in ResNet-50. For networks of basic or bottleneck blocks with ReLU.

    Works on the zoo, on ResNets and RegNets of timm and torchvision, and on inverted residual
    blocks (MobileNet, EfficientNet) there. Without its shortcut a block drops stochastic depth,
    which would drop the image, and a last batch norm whose scales are all zero starts at one.
    `result.rewrite_report` lists what changed; print it.

    Raises UserError if there is no shortcut that can be removed.
    """
    if exact and keep_projection:
        raise UserError("keep_projection=True and exact=True exclude each other; give one of them")
    model = copied(model)
    new_of: dict[nn.Module, nn.Module] = {}
    changed: dict[str, str] = {}
    left: dict[str, str] = {}
    for path, block in list(model.named_modules()):
        kind = _shortcut_kind(block)
        if kind is None:
            continue
        if keep_projection and kind != "identity":
            left[path] = f"{kind} kept"
            continue
        new_of[block] = reserved_block(path, block) if exact else _plain(block)
        changed[path] = f"{kind} {'in reserved channels' if exact else 'removed'}"
    if not changed:
        raise UserError(
            f"{type(model).__name__} has no shortcut that can be removed"
            f"{' except projections' if left else ''}; supported are fastkd's "
            f"residual blocks, {', '.join(LAYOUTS)}, and blocks with a switch "
            f"{' or '.join(SWITCHES)}"
        )
    # The name of the result in `create_model(shortcuts=..)`, if it has one.
    names = {"": False, "projection kept": "projection"}
    kept = ",".join(sorted(set(left.values())))
    options = {"shortcuts": names[kept]} if kept in names and not exact else None
    notes = _cost(new_of) if exact else _wake(new_of.values())
    report = RewriteReport("remove shortcuts", changed, left, notes)
    return finish(model, new_of, report, options)


class PlainBlock(nn.Module):
    """The branch of a foreign residual block: its layers in order, under their own names."""

    def __init__(self, block: nn.Module, branch: tuple[str, ...]) -> None:
        super().__init__()
        self.branch = tuple(name for name in branch if getattr(block, name) is not None)
        for name in dict.fromkeys(self.branch):
            self.add_module(name, getattr(block, name))
        self.train(block.training)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H', W'], as the block without its shortcut."""
        for name in self.branch:
            x_NCHW = getattr(self, name)(x_NCHW)
        return x_NCHW


def _layout(block: nn.Module) -> _Layout | None:
    return LAYOUTS.get(f"{type(block).__module__}.{type(block).__qualname__}")


def _shortcut_kind(block: nn.Module) -> str | None:
    """identity, padding or projection; None if nothing is added."""
    layout = _layout(block)
    if isinstance(block, ResidualBlock):
        shortcut, without = getattr(block, block.shortcut_name), None
    elif layout is not None:
        shortcut, without = getattr(block, layout.shortcut), layout.without
    else:
        return "identity" if any(getattr(block, one, None) is True for one in SWITCHES) else None
    if shortcut is None:
        return without
    kinds = {nn.Identity: "identity", PaddedShortcut: "padding"}
    return kinds.get(type(shortcut), "projection")


def _plain(block: nn.Module) -> nn.Module:
    """The block without its addition; changed in place, except for foreign residual blocks."""
    layout = _layout(block)
    if layout is not None:
        return PlainBlock(block, layout.branch)
    if isinstance(block, ResidualBlock):
        block.remove_shortcut()
    for switch in SWITCHES:
        if hasattr(block, switch):
            setattr(block, switch, False)
    return block


def _wake(blocks: Iterable[nn.Module]) -> tuple[str, ...]:
    """Set to one the scales of batch norms that were zeroed to start a block as its shortcut."""
    asleep = [
        norm
        for block in blocks
        for norm in block.modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm)
        and norm.affine
        and not norm.weight.is_meta
        and not norm.weight.any()
    ]
    for norm in asleep:
        nn.init.ones_(norm.weight)
    if not asleep:
        return ()
    return (f"{len(asleep)} batch norms had scale 0, which blocks everything, and now start at 1",)


def _cost(new_of: Mapping[nn.Module, nn.Module]) -> tuple[str, ...]:
    sizes = [
        sum(parameter.numel() for block in blocks for parameter in block.parameters())
        for blocks in (new_of.keys(), new_of.values())
    ]
    return (
        f"these blocks had {sizes[0]:,} parameters and now have {sizes[1]:,}; equal to the "
        "original in evaluation mode, batch norm is folded into the convolutions",
    )
