"""A residual block as a chain of convolutions with the same output: shortcuts removed exactly.

Called by `remove_shortcuts(exact=True)`. After a ReLU the block's input x is not negative, so the
ReLUs inside the branch do not change it: each convolution except the last gets extra output
channels that pass x on through a Dirac kernel (the strides subsample it as the shortcut would),
and the last one has the shortcut's matrix in its centre tap. The idea of RMNet (Meng et al. 2021,
arXiv 2111.00687), with batch norm folded in from its running statistics.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastkd.errors import UserError

__all__ = ["ReservedBlock", "reserved_block"]

RESNETS = ("torchvision.models.resnet", "timm.models.resnet")
BETWEEN = ("se", "aa", "drop_block")
"""Layers of timm's blocks that may be absent (None or nn.Identity) and must be."""


class ReservedBlock(nn.Module):
    """Convolutions with a ReLU after each."""

    def __init__(self, convs: list[nn.Conv2d]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)

    def preact(self, x_NCHW: Tensor) -> Tensor:
        """The former residual sum, before the last ReLU."""
        *inner, last = self.convs
        for conv in inner:
            x_NCHW = F.relu(conv(x_NCHW))
        return last(x_NCHW)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, in, H, W], not negative -> [N, out, H', W']."""
        return F.relu(self.preact(x_NCHW))


def reserved_block(path: str, block: nn.Module) -> ReservedBlock:
    """The chain that equals a basic or bottleneck block in evaluation mode; `block` is consumed.

    Raises UserError, with the path, for blocks for which this construction is not valid.
    """
    training = block.training
    block.eval()
    try:
        branch, shortcut = _branch(block), _shortcut(block)
    except UserError as error:
        raise UserError(f"{path}: its shortcut cannot be removed exactly: {error}") from None
    passed = branch[0].in_channels
    identity = torch.eye(passed).to(branch[0].weight)
    chain: list[nn.Conv2d] = []
    with torch.no_grad():
        for conv in branch[:-1]:
            chain.append(_widened(conv, passed * bool(chain), identity))
        matrix = identity if shortcut is None else shortcut.weight[:, :, 0, 0]
        last = _widened(branch[-1], passed, matrix, add=True)
        if shortcut is not None and last.bias is not None and shortcut.bias is not None:
            last.bias += shortcut.bias
    return ReservedBlock([*chain, last]).train(training)


def _widened(conv: nn.Conv2d, entering: int, matrix: Tensor, add: bool = False) -> nn.Conv2d:
    """`conv` with `entering` more input channels for x, which go through `matrix` in its centre.

    Without extra channels x is the convolution's own input. add: add the result to the
    convolution's outputs instead of appending it.
    """
    outputs, inputs = conv.weight.shape[:2]
    names = ("kernel_size", "stride", "padding", "dilation")
    spatial: dict[str, Any] = {name: getattr(conv, name) for name in names}
    with torch.device(conv.weight.device):
        wide = nn.Conv2d(
            inputs + entering, outputs if add else outputs + len(matrix), **spatial
        ).to(conv.weight.dtype)
    assert wide.bias is not None and conv.bias is not None
    for parameter, own in ((wide.weight, conv.weight), (wide.bias, conv.bias)):
        parameter.zero_()
        parameter[tuple(slice(size) for size in own.shape)] = own
    row, column = (size // 2 for size in conv.kernel_size)
    rows = slice(outputs) if add else slice(outputs, None)
    columns = slice(inputs, None) if entering else slice(None)
    wide.weight[rows, columns, row, column] += matrix
    return wide


def _branch(block: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of the branch with their batch norms folded in."""
    layers = dict(block.named_children())
    numbers = sorted(name.removeprefix("conv") for name in layers if name.startswith("conv"))
    if not numbers or not (hasattr(block, "preact") or type(block).__module__ in RESNETS):
        raise UserError(
            f"{type(block).__name__} is not a basic or bottleneck block after a ReLU; only there "
            "x is not negative"
        )
    for name, layer in layers.items():
        is_act = name.startswith(("act", "relu"))
        if is_act and type(layer) is not nn.ReLU:
            raise UserError(f"its activation {name} is {type(layer).__name__}, not ReLU")
        if name in BETWEEN and not isinstance(layer, nn.Identity):
            raise UserError(f"it has {name} ({type(layer).__name__}) in its branch")
    return [_folded(layers[f"conv{number}"], layers[f"bn{number}"]) for number in numbers]


def _shortcut(block: nn.Module) -> nn.Conv2d | None:
    """The projection with its batch norm folded in; None for an identity."""
    shortcut = getattr(block, "downsample", None)
    if shortcut is None or isinstance(shortcut, nn.Identity):
        return None
    layers = [one for one in shortcut.children() if not isinstance(one, nn.Identity)]
    if len(layers) != 2 or getattr(layers[0], "kernel_size", None) != (1, 1):
        raise UserError("its projection is not one 1x1 convolution with batch norm")
    return _folded(*layers)


def _folded(conv: nn.Module, norm: nn.Module) -> nn.Conv2d:
    fits = (
        type(conv) is nn.Conv2d
        and isinstance(norm, nn.modules.batchnorm._BatchNorm)
        and norm.running_var is not None
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and all(size % 2 == 1 for size in conv.kernel_size)
        and all(
            pad == reach * (size // 2)
            for pad, reach, size in zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
        )
    )
    if not fits:
        raise UserError(
            f"{conv} with {norm} is not a centred ordinary convolution with batch norm; remove "
            "shortcuts first, then use cheap blocks"
        )
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.modules.batchnorm._BatchNorm)
    return fuse_conv_bn_eval(conv, norm)
